"""Images to make as jobs: what may share a batch, the proof that sharing changes no image, results.

May import the core's bundles and images. The pipeline, and the service above it, import it.
"""
