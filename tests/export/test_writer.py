"""The writer of a stage: feeds it along the chain, checks it, and finds its FP32 islands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hipa_deploy.bundle.manifest import Precision, StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.references import References
from hipa_deploy.export.writer import StageSource, StageWriter, check_parity

RAMP = np.linspace(0, 1, 100, dtype=np.float32)
X_BD = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
X_BD[:, 0] = 0  # what meets the large weight below


class Layers(nn.Module):
    """x [B, 8] -> y [B, 8]: two linear layers, in place of a UNet."""

    places: ClassVar = {"first": "unet.first", "second": "unet.second"}

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x_BD: Tensor) -> Tensor:
        hidden_BD = self.first(x_BD.to(self.first.weight.dtype))
        return self.second(hidden_BD).float()


def with_large_constant() -> Layers:
    """In float16 one unit of 20,000 is 16: in range, and not faithful."""
    layers = Layers()
    layers.second.bias += 20_000
    return layers


def with_large_weight() -> Layers:
    """Not even in range: weights of the first layer are infinite in float16, and 0 x inf is NaN."""
    layers = Layers()
    layers.first.weight[:, 0] = 1e5
    return layers


def writer_of(
    root: Path,
    build: Callable[[], nn.Module],
    precision: Precision = "fp16",
    islands: dict[str, tuple[str, ...]] | None = None,
) -> tuple[StageWriter, StageSource]:
    x = TensorSpec(name="x", dtype="float32", shape=(4, 8))
    y = TensorSpec(name="y", dtype="float32", shape=(4, 8))
    with torch.no_grad():
        expected = build()(torch.from_numpy(X_BD)).numpy()
    references = References("a pear", (0,), {"x": X_BD, "y": expected})
    writer = StageWriter(
        root=root,
        precision=precision,
        specs={"unet": StageSpec(name="unet", inputs=(x,), outputs=(y,))},
        references=references,
        islands=islands,
    )
    return writer, StageSource("unet", build, ("x",), "y")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_sound_module_is_written_without_islands(tmp_path: Path, precision: Precision) -> None:
    writer, source = writer_of(tmp_path, Layers, precision)
    written = writer.write(source, {"x": X_BD})
    stage = written.stage
    assert (stage.path, stage.precision, stage.fp32_islands) == (
        "unet/model.onnx",
        precision,
        (),
    )
    assert (tmp_path / stage.path).is_file()
    assert stage.cost is not None
    np.testing.assert_allclose(written.output, writer.references.tensors["y"], atol=1e-2)


@pytest.mark.parametrize(
    ("build", "islands"), [(with_large_constant, ("second",)), (with_large_weight, ("first",))]
)
def test_a_layer_that_float16_cannot_hold_is_an_island(
    tmp_path: Path, build: Callable[[], nn.Module], islands: tuple[str, ...]
) -> None:
    writer, source = writer_of(tmp_path, build)
    stage, _ = writer.write(source, {"x": X_BD})
    assert stage.fp32_islands == islands
    assert stage.parity.psnr_db >= 35


def test_recorded_magnitudes_make_islands(tmp_path: Path) -> None:
    """What the general form of the model reached counts, by its place in the diffusers folder."""
    writer, source = writer_of(tmp_path, Layers)
    references = writer.references.plus({}, {"unet.first": 1e5})
    watched = StageWriter(tmp_path, "fp16", writer.specs, references)
    assert watched.write(source, {"x": X_BD}).stage.fp32_islands == ("first",)


def test_a_stage_is_fed_with_what_the_chain_gave(tmp_path: Path) -> None:
    """A wrong tensor from the stage before shows, though the module itself is right."""
    writer, source = writer_of(tmp_path, Layers, "fp32")
    with pytest.raises(HipaError, match=r"unet in fp32 is .* dB from PyTorch, .*--dtype fp32"):
        writer.write(source, {"x": X_BD[::-1].copy()})


def test_the_islands_of_a_bundle_are_kept(tmp_path: Path) -> None:
    writer, source = writer_of(tmp_path, with_large_weight, islands={"unet": ("first",)})
    assert writer.write(source, {"x": X_BD}).stage.fp32_islands == ("first",)
    writer, source = writer_of(tmp_path, with_large_weight, islands={"unet": ()})
    with pytest.raises(HipaError, match=r"with the bundle's FP32 islands. Export a bundle of its"):
        writer.write(source, {"x": X_BD})


def test_the_module_lives_only_while_it_is_exported(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(Layers):
        count = 0

        def __init__(self) -> None:
            super().__init__()
            Counted.count += 1
            alive.append(Counted.count)
            self.second.bias += 20_000

        def __del__(self) -> None:
            Counted.count -= 1

    writer, source = writer_of(tmp_path, Counted)
    alive.clear()
    writer.write(source, {"x": X_BD})
    assert alive == [1, 1]  # built twice, as float16 was not faithful; never two at a time
    assert Counted.count == 0


def test_the_gate_lets_a_near_output_pass() -> None:
    assert check_parity("unet", RAMP + np.float32(1e-5), RAMP, "fp32").psnr_db > 60


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.where(RAMP > 0.5, np.float32("nan"), RAMP), "unet in fp16 gives NaN or infinity"),
        (np.zeros_like(RAMP), "unet in fp16 gives a flat output"),
        (RAMP[::-1], r"unet in fp16 is .* dB from PyTorch"),
    ],
)
def test_the_gate_stops_another_output(output: np.ndarray, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        check_parity("unet", output, RAMP, "fp16")
