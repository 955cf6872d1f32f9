"""A torch module -> an ONNX graph: folds, precision, dynamic axes, cost, the weight map, checks.

May import: the core, and nothing else of ``hipa_deploy.export``.
"""
