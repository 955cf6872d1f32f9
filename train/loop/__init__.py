"""The training loop: steps, checkpoints, processes, interruption and progress.

May import: the core, ``train.recipes``, ``train.losses`` and ``train.model``.
"""
