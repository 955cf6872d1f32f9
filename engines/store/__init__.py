"""Engines on disk: the key that says what an engine is, its sidecar, and which engine fits this GPU.

May import: the core, ``engines.device``, ``engines.tensorrt``, ``engines.backends`` and
``engines.targets``.
"""
