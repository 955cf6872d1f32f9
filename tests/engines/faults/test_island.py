"""Graphs with parts in float32: read by the onnx package, run by ONNX Runtime, built by RTX."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.parity import compare
from hipa_deploy.engines.build.engine_check import stage_reference
from hipa_deploy.engines.build.ladder import ATTENTION, StageGraph
from hipa_deploy.engines.build.suspects import float32_run, onnxruntime_run
from hipa_deploy.engines.faults.island import widen, write_widened
from hipa_deploy.engines.faults.onnx_graph import FLOAT, FLOAT16, parse_graph
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import save_conv

BUNDLE = Bundle.open(embedded.BUNDLE)
BLOCKS = {
    "text_encoder": "text_encoder.text_model.encoder.layers.1",
    "vae_decoder": "vae.decoder.up_blocks.1.upsamplers.0",
}


@pytest.mark.parametrize("stage", sorted(BLOCKS))
def test_an_island_is_a_valid_graph_that_gives_the_same(stage):
    stage_graph = StageGraph.read(BUNDLE, stage)
    path = BUNDLE.stage_path(stage)
    tensors = stage_graph.tensors_of([BLOCKS[stage]])
    content = widen(path.read_bytes(), tensors)
    onnx.checker.check_model(onnx.load_from_string(content))

    feed = stage_reference(BUNDLE, stage).feed
    before = onnxruntime_run(path, feed)(())
    after = onnxruntime_run(path, feed, content)(())
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert compare(after[name], value).psnr_db > 45


def test_nothing_in_an_island_computes_in_float16():
    stage_graph = StageGraph.read(BUNDLE, "text_encoder")
    tensors = stage_graph.tensors_of([BLOCKS["text_encoder"]])
    model = onnx.load_from_string(widen(BUNDLE.stage_path("text_encoder").read_bytes(), tensors))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    inside = [node for node in model.graph.node if node.output[0].endswith(".fp32")]
    assert len([node for node in inside if node.op_type != "Cast"]) == len(tensors)
    for node in inside:
        if node.op_type != "Cast":
            assert FLOAT16 not in [types.get(name) for name in node.input]
            assert types[node.output[0]] == FLOAT


def test_a_whole_graph_in_float32_is_nearer_to_pytorch():
    reference = stage_reference(BUNDLE, "text_encoder")
    path = BUNDLE.stage_path("text_encoder")
    half = onnxruntime_run(path, reference.feed)(())["context"]
    whole = float32_run(path, reference.feed)(("add_3",))
    expected = reference.expected["context"]
    assert set(whole) == {"context", "add_3"}
    assert whole["add_3"].dtype == np.float32
    assert compare(whole["context"], expected).psnr_db >= compare(half, expected).psnr_db


def test_attention_is_widened_from_scores_to_output():
    stage_graph = StageGraph.read(BUNDLE, "text_encoder")
    assert len(stage_graph.tensors_of([ATTENTION])) == 3 * 4  # product, mask, softmax, product


def test_weights_beside_the_file_are_linked(tmp_path):
    path = tmp_path / "a" / "model.onnx"
    save_conv(path, np.float16, external=True)
    # The helper writes no types of inner tensors, and torch's exporter does.
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    path.write_bytes(inferred.SerializeToString())
    folder = tmp_path / "b"
    folder.mkdir()
    out = write_widened(path, ["h"], folder)
    assert (folder / "model.onnx.data").read_bytes() == (
        path.parent / "model.onnx.data"
    ).read_bytes()
    graph = parse_graph(out.read_bytes())
    assert graph.types["h.fp32"].element == FLOAT
    assert [node.operator for node in graph.nodes] == [
        "Cast", "Cast", "Cast", "Conv", "Cast", "Relu", "Cast",
    ]  # fmt: skip


def test_an_unknown_tensor_and_one_without_a_type_are_errors(tmp_path):
    path = tmp_path / "model.onnx"
    save_conv(path, np.float16)
    with pytest.raises(HipaError, match="no node of the graph gives 'nothing'"):
        widen(path.read_bytes(), ["nothing"])
    with pytest.raises(HipaError, match="does not say of which type 'x_in' is"):
        widen(path.read_bytes(), ["h"])
    path.write_bytes(b"somebody's photograph")
    with pytest.raises(HipaError, match="is not an ONNX file"):
        write_widened(path, ["h"], tmp_path)
