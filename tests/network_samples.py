"""The network that TensorRT-RTX's parser makes of an ONNX file; parsing needs no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.engines.tensorrt.library import recording_logger


def parse(path: Path):
    """Parse an ONNX file.

    Returns:
        The module of TensorRT-RTX, the network, and the objects that must live as long as it.

    """
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(recording_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, recording_logger(trt))
    assert parser.parse_from_file(str(path))
    return trt, network, (builder, parser)


def network_weights(trt, network, model) -> dict[str, np.ndarray]:
    """Return the network's floating-point weights by the names of their ONNX initializers."""
    inputs = {node.name: list(node.input) for node in model.graph.node}
    found = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # The weights are attributes of the layer's own class, which get_layer does not return.
        if layer.type == trt.LayerType.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer
            found |= dict(zip(inputs[layer.name][1:], (layer.kernel, layer.bias), strict=False))
        elif layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            if layer.weights.dtype.kind == "f":
                found[layer.name] = layer.weights
        else:
            # Other layers with weights, which this function would overlook.
            others = (trt.LayerType.SCALE, trt.LayerType.DECONVOLUTION, trt.LayerType.PLUGIN_V3)
            assert layer.type not in others
    return found
