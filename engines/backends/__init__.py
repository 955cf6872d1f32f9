"""Runners that need no engine: ONNX Runtime and OpenVINO.

May import: the core and ``engines.device``.
"""
