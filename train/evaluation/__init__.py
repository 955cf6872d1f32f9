"""The evaluation of one-step models: images, distances, spectra and the quality report.

May import: the core and the other rooms of training, except ``train.prediction``.
"""
