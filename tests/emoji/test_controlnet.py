"""examples/emoji/train_controlnet.py: control images of edges, and a ControlNet that learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_controlnet
from diffusers import ControlNetModel
from edges import control_image, find_edges
from train_controlnet import Contexts, ControlRounds, new_controlnet, rounds_at

from hipa_deploy.embedded import MODEL
from hipa_deploy.models.weights.controlnet import check_controlnet
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from tests.emoji.emoji_run import write_run


@pytest.fixture(scope="module")
def base() -> DiffusionModel:
    return DiffusionModel.load(MODEL)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_an_edge_is_a_thin_line_where_a_colour_changes() -> None:
    image = np.full((32, 32, 3), 255, np.uint8)
    # Red and this green are equally bright: a detector of brightness alone would miss the edge.
    image[:, 16:] = (200, 0, 0)
    image[16:, 16:] = (0, 102, 0)
    edges = find_edges(image)
    for line in (edges[8], edges[:, 24]):
        # One pixel wide, or two where the smoothed change is as large on both sides.
        assert line.any()
        assert set(line.nonzero()[0].tolist()) <= {15, 16}
    assert not edges[8:, :8].any()
    assert not find_edges(np.full((32, 32, 3), 128, np.uint8)).any()


def test_a_faint_step_is_no_edge() -> None:
    image = np.full((32, 32, 3), 120, np.uint8)
    image[:, 16:] = 140
    assert not find_edges(image).any()
    image[:, 16:] = 160
    assert find_edges(image).any()


def test_a_control_image_has_white_lines_on_black() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255
    control = control_image(image)
    assert control.shape == (16, 16, 3)
    assert control.dtype == np.uint8
    assert set(control.ravel().tolist()) == {0, 255}


def test_rounds_grow_with_the_steps_up_to_a_bound() -> None:
    counts = [rounds_at(step) for step in range(0, 20_000, 100)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == train_controlnet.MOST_ROUNDS


def test_a_batch_has_the_edges_of_its_pictures(
    run: Path, tmp_path: Path, base: DiffusionModel
) -> None:
    rounds = ControlRounds(run, base, tmp_path)
    rounds.extend(1)
    index = torch.tensor([3, 0])
    latents, control, captions = rounds.batch(index, 1, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 16, 16)
    assert control.shape == (2, 3, 128, 128)
    assert captions[0][0].startswith("3d emoji of a taxi")

    # The same pictures, drawn again.
    rng = np.random.default_rng((0, train_controlnet.SEED))
    pictures, _ = rounds.pictures.draw_batch(range(len(rounds.pictures)), rng)
    for place, number in enumerate(index.tolist()):
        assert torch.equal(control[place, 0] > 0, torch.from_numpy(find_edges(pictures[number])))

    # Another process reads the round.
    again = ControlRounds(run, base, tmp_path)
    again.extend(1)
    assert torch.equal(again.batch(index, 1, torch.Generator().manual_seed(0))[0], latents)


def test_a_caption_is_encoded_once(base: DiffusionModel) -> None:
    contexts = Contexts(base)
    first = contexts.of(["3d emoji", "", "3d emoji"])
    assert first.shape == (3, 77, 192)
    assert torch.equal(first[0], first[2])
    assert torch.allclose(first[:2], base.context(["3d emoji", ""]), atol=2e-3)
    assert torch.equal(contexts.of([""])[0], first[1])


def test_the_lines_reach_the_last_layer_of_the_reader(base: DiffusionModel) -> None:
    torch.manual_seed(0)
    reader = new_controlnet(base.unet).controlnet_cond_embedding
    lines = (torch.rand(1, 3, 128, 128) < 0.05).float()

    def before_the_last(control: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(reader.conv_in(control))
        for block in reader.blocks:
            hidden = torch.nn.functional.silu(block(hidden))
        return hidden

    with torch.no_grad():
        difference = before_the_last(lines) - before_the_last(torch.zeros_like(lines))
        # With PyTorch's weights it is 3e-5.
        assert difference.std() > 3e-3
        assert reader.conv_out.weight.abs().max() == 0


def test_a_short_training_is_resumed_and_writes_a_controlnet_that_fits(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train_controlnet.main(run, out, steps=2, batch=2)
    first = ControlNetModel.from_pretrained(out / "controlnet").state_dict()
    # The first step moves the zero convolutions alone.
    assert first["controlnet_mid_block.weight"].abs().max() > 0

    train_controlnet.main(run, out, steps=3, batch=2)
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 3
    second = ControlNetModel.from_pretrained(out / "controlnet").state_dict()
    assert not torch.equal(
        first["controlnet_mid_block.weight"], second["controlnet_mid_block.weight"]
    )
    unet = json.loads((MODEL / "unet" / "config.json").read_text(encoding="utf-8"))
    check_controlnet(out / "controlnet", unet, 8)
