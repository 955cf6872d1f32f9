"""How good a one-step model is: images, distances, spectra, and the quality report.

May import: the core and the other rooms of training, but ``prediction``.
"""
