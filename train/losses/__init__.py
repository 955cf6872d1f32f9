"""The HiPA adaptation loss and its parts: perceptual, frequency, edge and adversarial terms.

May import: the core and ``train.recipes``.
"""
