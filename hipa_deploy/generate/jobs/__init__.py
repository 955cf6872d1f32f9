"""Images to make as jobs: what may share a batch, and the proof that sharing changes no image.

May import the core's bundles and images. The pipeline, and the service above it, import it.
"""
