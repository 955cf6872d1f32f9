"""TensorRT and TensorRT-RTX: the library, CUDA, buffers, a stage, the runner, refitting.

May import: the core and ``engines.device``.
"""
