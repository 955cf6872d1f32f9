"""What this machine can do and whether it does it right: report, self-check, self-test.

May import: all of the core but ``commands`` and ``demo``; inside functions ``hipa_deploy.engines``.
"""
