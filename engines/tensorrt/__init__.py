"""TensorRT and TensorRT-RTX: the library, CUDA, buffers, one stage, the runner of all, refitting.

May import: the core and ``engines.device``.
"""
