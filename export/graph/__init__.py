"""A torch module -> an ONNX graph: folds, precision, dynamic axes, cost, the weight map, checks.

May import: the core, and nothing else of ``hipa_deploy.export``. ``run_apart`` alone imports
``hipa_deploy.engines.backends``, to run what was exported.
"""
