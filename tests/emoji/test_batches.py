"""What the UNet of the embedded model learns from: latents of pictures with captions that fit."""

from __future__ import annotations

from pathlib import Path

import latent_rounds
import pytest
import torch
from common import Float32GroupNorm, Run, use_float32_norms
from diffusers import AutoencoderKL
from latent_rounds import LatentRounds, choose_captions, rounds_at
from train_vae import new_vae, start_from

from tests.emoji.emoji_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = write_run(tmp_path / "run")
    vae = new_vae(128)
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    return folder


def test_rounds_grow_with_the_steps_up_to_a_bound() -> None:
    counts = [rounds_at(step) for step in range(0, 40_000, 100)]
    assert counts == sorted(counts)
    assert counts[0] == latent_rounds.FIRST_ROUNDS
    assert counts[-1] == latent_rounds.MOST_ROUNDS


def test_a_batch_has_the_latents_of_its_pictures_and_their_captions(run: Path) -> None:
    rounds = LatentRounds(run)
    rounds.extend(2)
    index = torch.tensor([3, 0, 3, 3, 3, 3])
    latents, captions = rounds.batch(index, 2, torch.Generator().manual_seed(0))
    assert latents.shape == (6, 4, 16, 16)
    assert latents.dtype == torch.float32
    assert captions[0][0].startswith("3d emoji of a taxi")
    assert captions[1][1].startswith("3d emoji of a fruit")
    # One emoji, two rounds: two pictures.
    assert len({tuple(row.flatten()[:8].tolist()) for row in latents[[0, 2, 3, 4, 5]]}) == 2


def test_rounds_are_read_back_and_not_encoded_again(run: Path) -> None:
    first = LatentRounds(run)
    first.extend(1)
    path = run / "latents" / "round-00.pt"
    written = path.stat().st_mtime_ns
    again = LatentRounds(run)
    again.extend(1)
    assert path.stat().st_mtime_ns == written
    index = torch.arange(4)
    one = first.batch(index, 1, torch.Generator().manual_seed(1))
    other = again.batch(index, 1, torch.Generator().manual_seed(1))
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


def test_a_kind_weighs_with_the_root_of_its_size(run: Path) -> None:
    weights = LatentRounds(run).weights()
    # Three fruits and one vehicle: a fruit each 1 / sqrt(3).
    assert weights.tolist() == pytest.approx([3**-0.5, 3**-0.5, 3**-0.5, 1.0])


def test_levels_and_dropout_have_their_shares() -> None:
    captions = [("exact", "kind", "style")] * 4000
    chosen = choose_captions(captions, 0.1, torch.Generator().manual_seed(0))
    shares = [chosen.count(name) / 4000 for name in ("", "exact", "kind", "style")]
    assert shares == pytest.approx([0.1, 0.54, 0.252, 0.108], abs=0.03)


def test_the_larger_vae_takes_over_what_the_smaller_one_knows() -> None:
    torch.manual_seed(0)
    smaller: AutoencoderKL = new_vae(64)
    larger: AutoencoderKL = new_vae(128)
    start_from(larger, smaller)
    # The outermost layers of both coders, which see the same edges.
    encoder, decoder = larger.encoder, larger.decoder
    one, other = encoder.down_blocks[0].resnets[0], smaller.encoder.down_blocks[0].resnets[0]
    assert torch.equal(one.conv1.weight, other.conv1.weight)
    one, other = decoder.up_blocks[3].resnets[1], smaller.decoder.up_blocks[2].resnets[1]
    assert torch.equal(one.conv2.weight, other.conv2.weight)
    assert torch.equal(decoder.conv_out.weight, smaller.decoder.conv_out.weight)
    assert larger.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean.shape == (1, 4, 16, 16)


def test_group_norms_in_float32_are_those_of_torch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.GroupNorm(2, 8))
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    use_float32_norms(model)
    assert type(model[1]) is Float32GroupNorm
    assert torch.equal(model(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_a_run_resumes_at_its_checkpoint_with_the_same_batches(tmp_path: Path) -> None:
    def new_run(steps: int) -> Run:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run(tmp_path / "part", {"model": model}, optimizer, steps, ema_decay=0.9)

    def train(run: Run) -> list[list[int]]:
        run.resume()
        seen = []
        for index, _ in run.batches(3, 10):
            run.modules["model"](torch.ones(1, 2)).sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.show(loss=0.0)
            seen.append(index.tolist())
        return seen

    first = train(new_run(3))
    more = new_run(5)
    rest = train(more)
    (tmp_path / "part" / "state.pt").unlink()
    whole = new_run(5)
    assert train(whole) == first + rest
    weights = whole.modules["model"].state_dict()
    for name, value in more.modules["model"].state_dict().items():
        assert torch.equal(value, weights[name])
        assert torch.equal(more.ema["model"][name], whole.ema["model"][name])
