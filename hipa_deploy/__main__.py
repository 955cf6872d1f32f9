"""``python -m hipa_deploy VERB``."""

from hipa_deploy.cli import main

main()
