"""What an export will take on a device: the sizes by headers, and refusals with what would fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import ADAPTOR, BUNDLE
from hipa_deploy.engines.targets.run_memory import engine_activations_mib
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.fit.export_plan import bundle_needs, need_lines, plan_export
from hipa_deploy.fit.model_sizes import predicted_sizes
from tests.sparse_model import NAMES, write_header, write_sparse

MEASURED = json.loads((Path(__file__).parents[3] / "docs/memory.json").read_text())


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("sd15") / "model", "sd15")


@pytest.fixture
def request_for(sd15: Path, tmp_path: Path) -> ExportOptions:
    return ExportOptions(model=str(sd15), out=tmp_path / "bundle", decoder=tmp_path / "tiny")


@pytest.mark.parametrize(
    ("size", "title"),
    [("sd15", "SD 1.5"), ("sd21-base", "SD 2.1, 512 px"), ("sd21", "SD 2.1, 768 px")],
)
@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_the_headers_tell_the_sizes_of_the_exported_graphs(
    tmp_path: Path, size: str, title: str, decoder: str
) -> None:
    """Against graphs that were exported in full, whose sizes the docs keep."""
    model = write_sparse(tmp_path / "model", size)
    options = ExportOptions(model=str(model), out=tmp_path / "out")
    if decoder == "tiny":
        options = replace(options, decoder=tmp_path / "tiny")
    sizes = predicted_sizes(options)
    assert sizes is not None
    assert [size.stage for size in sizes] == ["text_encoder", "unet", "vae_decoder"]
    for found in sizes:
        name = found.stage
        if name == "vae_decoder" and decoder == "tiny":
            name = "vae_decoder tiny"
        exported = MEASURED[title][name]
        assert found.activations == engine_activations_mib(exported["activation_bytes"])
        # The graph of the full decoder has some constants more.
        within = 0.08 if name == "vae_decoder" else 0.01
        mib = exported["weight_bytes"] / 2**20
        assert found.weights == pytest.approx(mib, rel=within, abs=1), name


def test_the_options_change_the_sizes(request_for: ExportOptions) -> None:
    plain = {size.stage: size for size in predicted_sizes(request_for)}
    wide = {size.stage: size for size in predicted_sizes(replace(request_for, dtype="fp32"))}
    four = {size.stage: size for size in predicted_sizes(replace(request_for, batch=4))}
    fused = predicted_sizes(replace(request_for, fuse=True))
    baked = predicted_sizes(replace(request_for, prompts=Path("prompts.txt")))
    assert wide["unet"].weights == pytest.approx(2 * plain["unet"].weights, abs=1)
    assert four["unet"].activations == pytest.approx(4 * plain["unet"].activations, abs=3)
    assert four["unet"].weights == plain["unet"].weights
    assert [size.stage for size in fused] == ["text_encoder", "generator"]
    assert [size.stage for size in baked] == ["unet", "vae_decoder"]


def test_the_base_unet_counts_too(request_for: ExportOptions) -> None:
    with_it = replace(request_for, with_teacher=True)
    sizes = predicted_sizes(with_it)
    assert sizes is not None
    assert sizes[:-1] == predicted_sizes(request_for)
    # Nothing is folded in it.
    assert (sizes[-1].stage, sizes[-1].weights) == ("teacher", 1640)
    needs = {need.what: need.need for need in plan_export(with_it, "agx-orin")}
    refining = needs["refining: shared memory"] - needs["running: shared memory"]
    assert refining == 1640 + (sizes[-1].activations or 0)
    crowded = replace(with_it, batch=4, decoder=None)
    # In low-memory mode it is loaded alone.
    verdicts = {need.what: need.verdict for need in plan_export(crowded, "orin-nano")}
    assert verdicts["refining: shared memory"] == "fits with --low-memory"
    with pytest.raises(HipaError, match="no --with-teacher"):
        plan_export(replace(crowded, batch=8, dtype="fp32"), "orin-nano")


def test_the_safety_checker_counts_too(sd15: Path, tmp_path: Path) -> None:
    """Stable Diffusion's has 304 million weights, the largest stage but the UNet."""
    model = tmp_path / "model"
    shutil.copytree(sd15, model)
    (model / "safety_checker").mkdir()
    weights = {"vision_model.weight": torch.empty(304_000, 1000, device="meta")}
    write_header(model / "safety_checker" / "model.safetensors", weights)
    options = ExportOptions(model=str(model), out=tmp_path / "out")
    sizes = predicted_sizes(options)
    without = predicted_sizes(replace(options, safety=False))
    assert sizes is not None
    assert sizes[:-1] == without == predicted_sizes(replace(options, model=str(sd15)))
    assert (sizes[-1].stage, sizes[-1].weights) == ("safety_checker", 580)
    with pytest.raises(HipaError, match="--mark no-safety"):
        plan_export(replace(options, dtype="fp32", batch=16), "orin-nano")


def test_the_orin_nano_takes_sd15_with_little_swap(request_for: ExportOptions) -> None:
    building, running = plan_export(request_for, "orin-nano")
    assert building.verdict == "fits with swap"
    assert building.need - building.have < 3 * 1024
    assert running.verdict == "fits"
    assert need_lines([running]) == [f"predicted: {running}: fits"]


def test_what_cannot_fit_is_refused_with_what_would(request_for: ExportOptions) -> None:
    with pytest.raises(HipaError) as refused:
        plan_export(replace(request_for, dtype="fp32"), "orin-nano")
    message = str(refused.value)
    assert "--for orin-nano: building" in message
    assert "--dtype fp16 (building: shared memory 8," in message
    assert "10 GiB of swap (" in message
    assert "--batch 1" not in message

    # Neither of two changes is enough: both together are.
    with pytest.raises(HipaError) as refused:
        plan_export(replace(request_for, dtype="fp32", batch=64), "orin-nano")
    assert "What would fit: --dtype fp16 --batch 1 --prompts FILE (" in str(refused.value)


def test_too_many_pixels(request_for: ExportOptions) -> None:
    large = replace(request_for, batch=16, height=2048, width=2048)
    with pytest.raises(HipaError) as refused:
        plan_export(large, "orin-nano")
    assert "no --height and --width (" in str(refused.value)
    # A larger device has room for the same.
    assert {need.verdict for need in plan_export(large, "thor")} == {"fits"}


def test_no_option_may_help(tmp_path: Path) -> None:
    """A UNet of six thousand million weights, which are a hole in its file."""
    model = write_sparse(tmp_path / "model", "sd15")
    huge = {"mid_block.weight": torch.empty(6_000, 1_000_000, device="meta")}
    write_header(model / "unet" / NAMES["unet"], huge)
    options = ExportOptions(model=str(model), out=tmp_path / "out")
    with pytest.raises(HipaError, match="No option makes it fit"):
        plan_export(options, "orin-nano")
    # Without swap the same UNet is built on a device with more memory.
    assert {need.verdict for need in plan_export(options, "thor")} == {"fits"}


def test_weights_that_torch_alone_can_read_are_not_predicted(tmp_path: Path) -> None:
    model = write_sparse(tmp_path / "model", "sd15")
    (model / "unet" / NAMES["unet"]).unlink()
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickled")
    assert plan_export(ExportOptions(model=str(model), out=tmp_path / "out"), "orin-nano") == ()


def test_a_bundle_is_planned_by_its_own_files() -> None:
    options = ExportOptions(model="emoji", out=Path("out"), adaptor=ADAPTOR)
    predicted = plan_export(options, "orin-nano")
    actual = bundle_needs(Bundle.open(BUNDLE), "orin-nano")
    for before, after in zip(predicted, actual, strict=True):
        assert before.what == after.what
        assert before.need == pytest.approx(after.need, rel=0.02)
    # An engine of TensorRT-RTX is built on any machine: only its run is planned for the GPU.
    assert [need.what for need in bundle_needs(Bundle.open(BUNDLE), "rtx4090")] == [
        "running: GPU memory"
    ]
