"""The model that trains: the frozen base, its low-rank layers, the one step, precision, averages.

May import: the core and ``train.recipes``.
"""
