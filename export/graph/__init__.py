"""From a torch module to an ONNX graph: folding, precision, axes, cost, and the map of its weights.

May import: the core, and nothing else of ``hipa_deploy.export``.
"""
