"""What this machine can do and whether it does it right: report, self-check, self-test.

May import: all of the core but ``commands`` and ``demo``; inside functions ``hipa_deploy.engines``.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
