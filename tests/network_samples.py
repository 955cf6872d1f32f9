"""What TensorRT-RTX's parser makes of an ONNX file; no GPU is needed for that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.engines.tensorrt.library import recording_logger


def parse(path: Path):
    """TensorRT-RTX, the network it makes of ``path``, and what must live as long."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(recording_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, recording_logger(trt))
    assert parser.parse_from_file(str(path))
    return trt, network, (builder, parser)


def network_weights(trt, network, model) -> dict[str, np.ndarray]:
    """Every weight of floating point in the network, by the name of its ONNX initializer."""
    inputs = {node.name: list(node.input) for node in model.graph.node}
    found = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer
            found |= dict(zip(inputs[layer.name][1:], (layer.kernel, layer.bias), strict=False))
        elif layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            if layer.weights.dtype.kind == "f":
                found[layer.name] = layer.weights
        else:
            assert layer.type not in (
                trt.LayerType.SCALE,
                trt.LayerType.DECONVOLUTION,
                trt.LayerType.PLUGIN_V3,
            )
    return found
