"""Models on a user's disk: where one is, of what kind, and the folders of adaptors and decoders.

May import the ground (errors, files, hashing, record, tasks) and ``embedded``; torch and diffusers
only inside the functions that convert a checkpoint, fetch a model or read a configuration.
"""
