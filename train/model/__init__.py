"""The model that trains: the frozen base, its low-rank layers, one step, precision and averages.

May import: the core and ``hipa_deploy.train.recipes.recipe``.
"""
