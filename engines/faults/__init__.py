"""An ONNX graph read block by block, the faults of TensorRT that are known, and what mends them.

May import: the core, ``engines.tensorrt`` and ``engines.targets``. Nothing here needs a GPU, torch
or the onnx package.
"""
