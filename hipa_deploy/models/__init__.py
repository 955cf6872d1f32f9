"""Models on disk: where one is, what kind it is, and folders of adaptors and decoders.

May import: the ground and ``embedded``. torch and diffusers only where a checkpoint is converted.
"""
