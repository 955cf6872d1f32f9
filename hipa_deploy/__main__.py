"""``python -m hipa_deploy VERB``."""

from hipa_deploy.commands.app import main

main()
