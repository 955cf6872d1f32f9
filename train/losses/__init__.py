"""The HiPA adaptation loss and its parts: perceptual distances, frequencies, edges, a discriminator.

May import: the core and ``hipa_deploy.train.recipes.recipe``.
"""
