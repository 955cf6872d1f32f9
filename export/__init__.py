"""Merge, specialise, export to ONNX, compare: base model (+ adaptor) -> bundle."""

if __name__ == "export":
    raise ImportError("import hipa_deploy.export, not export")
