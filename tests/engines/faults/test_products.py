"""The matrix products of a graph, against the count that the export made with the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.faults.onnx_graph import read_graph
from hipa_deploy.engines.faults.products import Product, find_products


def test_the_embedded_bundle_has_the_operations_that_its_export_counted():
    bundle = Bundle.open(BUNDLE)
    for stage in bundle.manifest.stages:
        products = find_products(read_graph(bundle.stage_path(stage.spec.name)))
        assert sum(product.flops for product in products) == stage.cost.flops
        weights = sum(product.weight_bytes for product in products)
        assert 0.9 * stage.cost.weight_bytes < weights <= stage.cost.weight_bytes


def one_node(folder, node, inputs, weights, output):
    """A graph of one node, with a weight of zeros for each of ``weights``."""
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, s) for name, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, output)],
        [numpy_helper.from_array(np.zeros(s, np.float16), name) for name, s in weights.items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return find_products(read_graph(path))


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "weights", "output", "expected"),
    [
        (
            "Conv", {"group": 2}, {"x": (2, 8, 5, 6)}, {"w": (10, 4, 3, 3)}, (2, 10, 5, 6),
            Product(copies=2, m=60, n=5, k=36, weight_bytes=720),
        ),
        (
            "ConvTranspose", {"strides": [2, 2]}, {"x": (1, 8, 5, 6)}, {"w": (8, 3, 2, 2)},
            (1, 3, 10, 12), Product(copies=1, m=30, n=12, k=8, weight_bytes=192),
        ),
        (
            "MatMul", {}, {"x": (2, 77, 16)}, {"w": (16, 32)}, (2, 77, 32),
            Product(copies=1, m=154, n=32, k=16, weight_bytes=1024),
        ),
        (
            "MatMul", {}, {"x": (2, 8, 77, 16), "w": (2, 8, 16, 64)}, {}, (2, 8, 77, 64),
            Product(copies=16, m=77, n=64, k=16),
        ),
        (
            "Gemm", {"transA": 1, "transB": 1}, {"x": (16, 3)}, {"w": (32, 16)}, (3, 32),
            Product(copies=1, m=3, n=32, k=16, weight_bytes=1024),
        ),
        ("MatMul", {}, {"x": ("batch", 16)}, {"w": (16, 32)}, ("batch", 32), None),
        ("Einsum", {"equation": "ij,jk->ik"}, {"x": (3, 16)}, {"w": (16, 32)}, (3, 32), None),
    ],
)  # fmt: skip
def test_each_operator(tmp_path, operator, attributes, inputs, weights, output, expected):
    node = helper.make_node(operator, ["x", "w"], ["y"], **attributes)
    found = one_node(tmp_path, node, inputs, weights, output)
    assert found == (None if expected is None else (expected,))
