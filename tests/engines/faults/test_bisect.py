"""The search between two ONNX Runtime sessions, of which one has a fault."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.onnx_weights import read_initializers, with_values
from hipa_deploy.engines.build.engine_check import stage_reference
from hipa_deploy.engines.build.ladder import StageGraph
from hipa_deploy.engines.build.suspects import float32_run, onnxruntime_run
from hipa_deploy.engines.faults.bisect import Bisection, Run, bisect, distance_db, render_bisection
from hipa_deploy.errors import HipaError

BUNDLE = Bundle.open(embedded.BUNDLE)
GATE_DB = 35.0


def negative(value: np.ndarray) -> np.ndarray:
    return -value


def threefold(value: np.ndarray) -> np.ndarray:
    return 3 * value


def with_fault(stage: str, weight: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The stage's file with one weight changed."""
    path = BUNDLE.stage_path(stage)
    value = read_initializers(path)[weight].read()
    content, external = with_values(path, {weight: change(value).astype(value.dtype)})
    assert not external
    return content


def find(stage: str, suspect: Run) -> Bisection:
    graph = StageGraph.read(BUNDLE, stage)
    path = BUNDLE.stage_path(stage)
    feed = stage_reference(BUNDLE, stage).feed
    usual = onnxruntime_run(path, feed)
    return bisect(
        stage, graph.graph, graph.blocks, suspect, float32_run(path, feed), usual, GATE_DB
    )


def run_of(stage: str, content: bytes | None = None) -> Run:
    return onnxruntime_run(BUNDLE.stage_path(stage), stage_reference(BUNDLE, stage).feed, content)


@pytest.mark.parametrize(
    ("stage", "weight", "change", "block", "operator"),
    [
        ("vae_decoder", "decoder.up_blocks.1.resnets.0.conv2.weight", negative,
         "vae.decoder.up_blocks.1.resnets.0", "Conv"),
        # Query, key and value are branches, of which the next in the file are right.
        ("text_encoder", "val_94", negative,
         "text_encoder.text_model.encoder.layers.1", "MatMul"),
        ("text_encoder", "encoder.text_model.encoder.layers.1.layer_norm2.weight", threefold,
         "text_encoder.text_model.encoder.layers.1", "LayerNormalization"),
        ("vae_decoder", "val_44", threefold,
         "vae.decoder.mid_block.resnets.0", "Mul"),
    ],
    ids=["conv", "attention projection", "layer norm", "group norm"],
)  # fmt: skip
def test_a_planted_fault_is_found(stage, weight, change, block, operator):
    found = find(stage, run_of(stage, with_fault(stage, weight, change)))
    assert (found.verdict, found.block, found.operator) == ("layer", block, operator)
    # The very node that takes the changed weight.
    graph = StageGraph.read(BUNDLE, stage).graph
    assert weight in graph.nodes[graph.makers()[found.tensor]].inputs
    assert len(found.probes) < 20
    assert not found.probes[0].output_right


def test_a_fault_in_the_unet_is_found_in_ten_runs():
    content = with_fault("unet", "unet.down_blocks.1.resnets.0.conv2.weight", negative)
    found = find("unet", run_of("unet", content))
    assert (found.block, found.operator) == ("unet.down_blocks.1.resnets.0", "Conv")
    assert len(found.probes) <= 12


def test_a_fault_that_goes_when_a_tensor_is_an_output_is_a_fusion():
    """As Thor's: the projection is wrong only while it is fused with its neighbours."""
    faulty = run_of("text_encoder", with_fault("text_encoder", "val_94", negative))
    right = run_of("text_encoder")

    def fused(marks: tuple[str, ...]):
        return (right if "val_95" in marks else faulty)(marks)

    found = find("text_encoder", fused)
    assert (found.verdict, found.tensor) == ("fusion", "val_95")
    assert found.block == "text_encoder.text_model.encoder.layers.1"
    assert "a fusion across val_95 (MatMul in text_encoder" in str(found)


def test_nothing_departs_from_itself():
    found = find("vae_decoder", run_of("vae_decoder"))
    assert (found.verdict, found.block, len(found.probes)) == ("right", None, 1)
    assert str(found) == "vae_decoder: the output agrees with the reference."


def test_nan_is_followed_to_where_it_begins():
    def poison(value):
        return np.full_like(value, np.nan)

    content = with_fault("vae_decoder", "decoder.mid_block.resnets.1.conv1.bias", poison)
    found = find("vae_decoder", run_of("vae_decoder", content))
    assert (found.block, found.operator) == ("vae.decoder.mid_block.resnets.1", "Conv")
    assert None in [probe.psnr_db for probe in found.probes]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_bisection(found))
    text = console.export_text()
    assert "not comparable" in text
    assert "the first wrong tensor is" in text
    assert Bisection.model_validate_json(found.model_dump_json()) == found


def test_an_output_that_does_not_come_back_is_an_error():
    with pytest.raises(HipaError, match="did not come back"):
        find("vae_decoder", lambda marks: {})


def test_infinities_that_both_have_are_no_error():
    mask = np.float16([0, -np.inf, 1])
    assert distance_db(mask, mask) == 200
    assert distance_db(np.float16([0, 0, 1]), mask) is None
    assert distance_db(np.zeros(2), mask) is None
    assert distance_db(mask[1:2], mask[1:2]) == 200
