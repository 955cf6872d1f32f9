"""A module to ONNX: names, dynamic sizes, and bytes that depend on nothing but the weights."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
import torch
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch import Tensor, nn

from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.to_onnx import OPSET, export_stage

BATCH = {"batch": Axis(min=1, opt=2, max=4)}


class Linear(nn.Module):
    """x [B, 8] -> y [B, 8]."""

    places: ClassVar = {"layer": "unet.layer"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.layer(x_BD)


class FixedBatch(Linear):
    """The same, for two rows alone."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.layer(x_BD.view(2, 8))


class ForTheRules(Linear):
    """The same after detours, most of which onnxscript's rules take away."""

    def forward(self, x_BD: Tensor) -> Tensor:
        left, right = x_BD[:, :4], x_BD[:, 4:]
        detour = torch.cat([right, left], 1).reshape(2, 4, 2).reshape(2, 2, 4).unsqueeze(1)
        detour = detour.transpose(2, 3).transpose(2, 3).squeeze(1)
        return self.layer(torch.relu(torch.relu(detour.reshape(2, 8)))) + 0.0


def spec_of(axes: dict[str, Axis]) -> StageSpec:
    batch = "batch" if axes else 2
    x = TensorSpec(name="x", dtype="float32", shape=(batch, 8))
    y = TensorSpec(name="y", dtype="float32", shape=(batch, 8))
    return StageSpec(name="unet", inputs=(x,), outputs=(y,), axes=axes)


@pytest.mark.parametrize(("axes", "size"), [({}, 2), (BATCH, "batch")])
def test_the_graph_has_the_specs_names_and_sizes(
    tmp_path: Path, axes: dict[str, Axis], size: int | str
) -> None:
    files = export_stage(Linear(), spec_of(axes), tmp_path / "unet")
    assert [path.name for path in files] == ["model.onnx", "weights.json"]
    model = onnx.load(tmp_path / "unet/model.onnx")
    assert model.opset_import[0].version == OPSET
    for value, name in ((model.graph.input[0], "x"), (model.graph.output[0], "y")):
        first = value.type.tensor_type.shape.dim[0]
        assert value.name == name
        assert (first.dim_param or first.dim_value) == size


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_stage(Linear(), spec_of({}), tmp_path / name)
    for file in ("model.onnx", "weights.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    model = onnx.load(tmp_path / "one/model.onnx")
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_rules_are_tried_where_they_can_match_and_the_graph_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    match = SimplePatternMatcher.match

    def counted(matcher: Any, model: Any, graph: Any, node: Any, **keywords: Any) -> Any:
        tried.append(node.op_type)
        return match(matcher, model, graph, node, **keywords)

    monkeypatch.setattr(SimplePatternMatcher, "match", counted)
    export_stage(ForTheRules(), spec_of({}), tmp_path / "quick")
    quick = len(tried)
    monkeypatch.setattr(
        "hipa_deploy.export.graph.to_onnx._rules_where_they_can_match", contextlib.nullcontext
    )
    export_stage(ForTheRules(), spec_of({}), tmp_path / "everywhere")
    assert quick < (len(tried) - quick) / 5

    graphs = [(tmp_path / name / "model.onnx").read_bytes() for name in ("quick", "everywhere")]
    assert graphs[0] == graphs[1]
    operators = [node.op_type for node in onnx.load_from_string(graphs[0]).graph.node]
    assert "Transpose" not in operators
    assert operators.count("Relu") == 1


def test_large_weights_go_to_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hipa_deploy.export.graph.to_onnx.EXTERNAL_DATA_BYTES", 16)
    files = export_stage(Linear(), spec_of({}), tmp_path)
    assert [path.name for path in files] == ["model.onnx", "model.onnx.data", "weights.json"]


def test_an_axis_that_the_module_fixes(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="unet: this model does not allow a dynamic batch"):
        export_stage(FixedBatch(), spec_of(BATCH), tmp_path)


def test_no_weight_stays_in_memory(tmp_path: Path) -> None:
    """The exporter's own caches hold the last graph, which must not hold its weights."""
    module = Linear()
    weights = [weakref.ref(weight) for weight in module.parameters()]
    assert weights
    export_stage(module, spec_of({}), tmp_path / "stage")
    del module
    gc.collect()
    assert not any(weight() is not None for weight in weights)
