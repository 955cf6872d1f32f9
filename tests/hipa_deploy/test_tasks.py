from __future__ import annotations

import numpy as np
import pytest
import torch

from hipa_deploy.tasks import STEP_INPUTS, Task, finish_latents, start_latents, strength_timestep

SHAPE = (2, 4, 3, 3)


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask_B1HW = (rng.random((2, 1, 3, 3)) < 0.5).astype(np.float32)
    return {
        "noise": rng.normal(size=SHAPE),
        "source": rng.normal(size=SHAPE),
        "mask": mask_B1HW,
        "control": rng.integers(0, 256, (2, 24, 24, 3), np.uint8),
        "control_scale": np.ones(2, np.float32),
    }


def test_closed_forms(inputs: dict[str, np.ndarray]) -> None:
    assert np.array_equal(start_latents("generate", inputs, 0.25), inputs["noise"])
    assert np.array_equal(start_latents("upscale", inputs, 0.25), inputs["source"])
    edit = 0.5 * inputs["source"] + 0.75**0.5 * inputs["noise"]
    assert np.allclose(start_latents("edit", inputs, 0.25), edit)
    # A ControlNet guides what starts from noise, and the noise of a method may be scaled.
    started = start_latents("control", inputs, 0.25, noise_scale=3.0)
    assert np.array_equal(started, 3.0 * inputs["noise"])


def test_inpainting_keeps_the_source_outside_the_mask(inputs: dict[str, np.ndarray]) -> None:
    hole = np.broadcast_to(inputs["mask"] == 1, SHAPE)
    start = start_latents("inpaint", inputs, 0.0047)
    assert np.array_equal(start[hole], inputs["noise"][hole])
    assert np.array_equal(start[~hole], inputs["source"][~hole])
    x0 = np.full(SHAPE, 7.0)
    assert np.array_equal(finish_latents("inpaint", x0, inputs)[~hole], inputs["source"][~hole])
    assert (finish_latents("inpaint", x0, inputs)[hole] == 7).all()
    assert np.array_equal(
        start_latents("inpaint", inputs, 0.0047, concatenates=True), inputs["noise"]
    )


@pytest.mark.parametrize("task", STEP_INPUTS)
def test_torch_and_numpy_agree(task: Task, inputs: dict[str, np.ndarray]) -> None:
    tensors = {name: torch.from_numpy(inputs[name]) for name in STEP_INPUTS[task]}
    alpha_bar_B111 = np.array([0.1, 0.9]).reshape(2, 1, 1, 1)
    by_numpy = start_latents(task, inputs, alpha_bar_B111)
    by_torch = start_latents(task, tensors, torch.from_numpy(alpha_bar_B111)).numpy()
    assert np.allclose(by_torch, by_numpy)


@pytest.mark.parametrize(
    ("strength", "timestep"), [(1.0, 999), (0.75, 749), (0.5, 499), (0.25, 249), (1e-9, 0)]
)
def test_strengths(strength: float, timestep: int) -> None:
    assert strength_timestep(strength) == timestep
