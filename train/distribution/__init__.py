"""Terms that compare the student's distribution with the teacher's, on noised latents.

May import: the core, ``train.recipes``, ``train.losses`` and ``train.model``.
"""
