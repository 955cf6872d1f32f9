"""The training loop: steps, checkpoints, processes, interruption and progress.

May import: the core, ``train.recipes``, ``train.losses`` and ``train.model``.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
