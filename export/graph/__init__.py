"""A torch module -> an ONNX graph: folds, precision, dynamic axes, cost and the weight map.

May import: the core, and nothing else of ``hipa_deploy.export``.
"""
