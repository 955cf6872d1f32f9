"""What a training learns from: prompt files, teacher pairs, source images, masks, examples of each task.

May import: the core, ``train.recipe``, ``train.model`` and ``train.loop``'s processes and progress bar.
"""
