"""Base model (+ adaptor) -> bundle: merge, specialise to one step, export to ONNX, compare.

``export_bundle`` is the whole path; ``export_swap`` writes another adaptor for an existing bundle.
References are made by PyTorch in float32 before anything is exported, and every stage is checked
against them.

May import: the core and ``hipa_deploy.export.graph``.
"""

if __name__ == "export":
    raise ImportError("import hipa_deploy.export, not export")
