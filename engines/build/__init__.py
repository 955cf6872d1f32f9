"""From a bundle's ONNX to engines: the memory plan, the worker process, the precision check.

May import: the core and the other rooms of ``engines``, but ``latency``.
"""
