"""Engines on disk: the key that says what one is, its sidecar, and which one fits this GPU.

May import: the core, ``engines.device``, ``engines.tensorrt``, ``engines.backends`` and
``engines.targets``.
"""
