"""The runner contract: what a stage is given is checked by name, dtype, shape and range."""

from __future__ import annotations

import numpy as np
import pytest

from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import BACKENDS, check_backend, check_inputs

SPEC = StageSpec(
    name="unet",
    inputs=(
        TensorSpec(name="noise", dtype="float32", shape=("batch", 4, 2, 2)),
        TensorSpec(name="context", dtype="float16", shape=("batch", 77, 8)),
    ),
    outputs=(TensorSpec(name="latents", dtype="float32", shape=("batch", 4, 2, 2)),),
    axes={"batch": Axis(min=1, opt=1, max=4)},
)


def inputs(batch: int = 2, context_batch: int | None = None) -> dict[str, np.ndarray]:
    context_batch = batch if context_batch is None else context_batch
    return {
        "noise": np.zeros((batch, 4, 2, 2), np.float32),
        "context": np.zeros((context_batch, 77, 8), np.float16),
    }


def test_the_sizes_of_the_axes() -> None:
    assert check_inputs(SPEC, inputs(3)) == {"batch": 3}


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"noise": inputs()["noise"]}, r"got inputs \['noise'\], expected \['context', 'noise'\]"),
        (inputs() | {"noise": np.zeros((2, 4, 2, 2))}, "input noise is float64"),
        (inputs() | {"noise": np.zeros((2, 4, 2), np.float32)}, r"noise is float32 \[2, 4, 2\]"),
        (inputs() | {"noise": np.zeros((2, 3, 2, 2), np.float32)}, r"\[2, 3, 2, 2\], expected"),
        (inputs(2, context_batch=3), r"input context is float16 \[3, 77, 8\]"),
        (inputs(5), "batch is 5, expected 1 to 4"),
    ],
)
def test_what_is_refused(got: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(HipaError, match=f"unet: .*{message}|unet: {message}"):
        check_inputs(SPEC, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_known(backend: str) -> None:
    check_backend(backend)


def test_an_unknown_backend() -> None:
    with pytest.raises(HipaError, match=r"backend 'vulkan' is unknown\. Expected one of: auto"):
        check_backend("vulkan")
