"""The bundle on disk: manifest, files, reference, adaptors to swap in, and the parity gate.

May import: the ground (errors, interrupts, record, tasks), ``disk``.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
