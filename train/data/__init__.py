"""The training data: teacher pairs, source images, masks, and the examples of each task.

May import: the core, ``train.recipes``, ``train.model``, and from ``train.loop`` the processes and
the progress bar.
"""
