"""What this machine can do, and whether it does it right: the report, the self-check, the self-test.

May import: all of the core but ``commands`` and ``demo``; ``hipa_deploy.engines`` when it is called.
"""
