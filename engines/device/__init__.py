"""What this machine is and how it runs: memory, clocks, temperatures, power. Nothing here raises.

May import: the core.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
