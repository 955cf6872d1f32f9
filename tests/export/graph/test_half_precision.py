"""Weights that were made to be fine in float32 and not in float16."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from hipa_deploy.export.graph.half_precision import (
    Ranges,
    Rounding,
    fewest_islands,
    islands_by_range,
    to_half,
    whole_attentions,
)

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def unet(model_dir: Path) -> UNet2DConditionModel:
    return (
        UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture
def decoder(model_dir: Path) -> nn.Module:
    return (
        AutoencoderKL.from_pretrained(model_dir, subfolder="vae")
        .eval()
        .requires_grad_(False)
        .decoder
    )


class Call(nn.Module):
    """A UNet as a function of one tensor."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noise_BCHW: torch.Tensor) -> torch.Tensor:
        context = torch.linspace(-1, 1, 77 * 16).view(1, 77, 16).to(noise_BCHW.dtype)
        return self.unet(noise_BCHW, 999, context, return_dict=False)[0].float()


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def islands_of(module: nn.Module) -> tuple[tuple[str, ...], torch.Tensor]:
    with torch.no_grad(), Ranges().watching() as ranges:
        output = module(latents())
    return islands_by_range(module, ranges.by_name(module)), output


@torch.no_grad()
def error_in_half(module: nn.Module, islands: tuple[str, ...], exact: torch.Tensor) -> float:
    got = to_half(module, islands)(latents().half()).float()
    return float((got - exact).norm() / exact.norm())


def test_a_sound_model_has_no_islands_and_no_casts(unet: UNet2DConditionModel) -> None:
    islands, exact = islands_of(Call(unet))
    assert islands == ()
    assert error_in_half(Call(unet), islands, exact) < 0.02
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert {weight.dtype for weight in unet.parameters()} == {torch.float16}


def test_overflow_in_the_decoder(decoder: nn.Module) -> None:
    """The residual stream is out of range from conv_in on.

    The layers that read it are islands; the convolutions between two norms are not.
    """
    decoder.conv_in.weight *= 1e7
    islands, exact = islands_of(decoder)
    assert "conv_in" in islands
    assert "mid_block.resnets.0.norm1" in islands
    assert not any(".conv1" in name or ".conv2" in name for name in islands)
    assert error_in_half(decoder, islands, exact) < 0.02


def test_without_islands_the_overflow_shows(decoder: nn.Module) -> None:
    decoder.conv_in.weight *= 1e7
    _, exact = islands_of(decoder)
    assert not error_in_half(decoder, (), exact) < 0.02


def test_overflow_of_attention_scores(unet: UNet2DConditionModel) -> None:
    """Neither weights nor queries are out of range, only their product with the keys is."""
    attention = unet.get_submodule(ATTENTION)
    attention.to_q.weight *= 3e3
    attention.to_k.weight *= 3e3
    islands, exact = islands_of(Call(unet))
    assert islands == (f"unet.{ATTENTION}",)
    assert error_in_half(Call(unet), islands, exact) < 0.02


def test_rounding_that_hurts_is_found_and_avoided(unet: UNet2DConditionModel) -> None:
    """In range, but where one unit of float16 is 16: the output carries a large constant."""
    unet.conv_out.bias += 20_000
    module = Call(unet)
    islands, exact = islands_of(module)
    assert islands == ()
    emulate = Rounding(module)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}

    def faithful(got: torch.Tensor) -> bool:
        return bool((got - exact).abs().max() < 0.1)

    assert not faithful(emulate((latents(),)))
    assert fewest_islands(module, (latents(),), faithful, islands) == ("unet.conv_out",)
    for name, weight in module.state_dict().items():
        np.testing.assert_array_equal(weight, before[name])


def test_the_emulation_rounds_weights_and_leaves_them_as_they_were(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run fails inside of a layer."""
    module = Call(unet)
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    places = {name: weight.data_ptr() for name, weight in module.named_parameters()}
    output = Rounding(module)((latents(),))

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(unet.conv_out, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            Rounding(module)((latents(),))
    for name, weight in module.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.data_ptr() == places[name]

    # Weights that are rounded already give the same.
    for weight in module.parameters():
        weight.data = weight.data.half().float()
    assert torch.equal(output, Rounding(module)((latents(),)))
    assert not torch.equal(output, module(latents()))


def test_query_key_and_value_stand_and_fall_together() -> None:
    names = ["a.attn1.to_q", "a.attn1.to_k", "a.attn1.to_out.0", "b.conv"]
    assert whole_attentions(names) == ("a.attn1", "b.conv")
