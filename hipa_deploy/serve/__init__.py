"""The image service without HTTP: models by name, a bounded queue, batches, encoding, metrics.

May import the core, the images, the bundles and the pipeline. It knows nothing of a web framework,
so that another one can carry it.
"""
