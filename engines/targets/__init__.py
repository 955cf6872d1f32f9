"""Where an engine is to run: this GPU, or one that is named ahead of time (``*.toml``).

May import: the core, ``engines.device``, ``engines.tensorrt`` and ``engines.backends``.
"""
