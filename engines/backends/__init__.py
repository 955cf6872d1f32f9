"""Runners that need no engine: ONNX Runtime and OpenVINO; and which backends this machine can run.

May import: the core, ``engines.device`` and ``engines.tensorrt``.
"""
