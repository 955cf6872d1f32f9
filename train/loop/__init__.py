"""What keeps a training going: steps, checkpoints, processes, interruption, progress.

May import: the core, ``train.recipe``, ``train.model`` and ``train.losses``.
"""
