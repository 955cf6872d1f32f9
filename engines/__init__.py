"""Build, run and time engines: TensorRT, TensorRT-RTX, ONNX Runtime and OpenVINO.

Nothing here imports torch or onnx. The rooms, each of which may import those above it:

- ``device``: what this machine is, read from the system's files.
- ``tensorrt``: the TensorRT library, CUDA, and the runner of engines.
- ``backends``: the runners that need no engine.
- ``targets``: the GPUs that an engine can be built for.
- ``store``: engines on disk, and which of them fits this GPU.
- ``build``: ONNX files to engines.
- ``latency``: how long the stages take, and where the time goes.
"""

if __name__ == "engines":
    raise ImportError("import hipa_deploy.engines, not engines")
