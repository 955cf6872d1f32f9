"""Build, run and time: ONNX Runtime, TensorRT and TensorRT-RTX. Nothing here imports torch."""

if __name__ == "engines":
    raise ImportError("import hipa_deploy.engines, not engines")
