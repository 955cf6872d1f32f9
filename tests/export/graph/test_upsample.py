from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hipa_deploy.export.graph.upsample import UpsampledConv, fold_upsampling


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
)
@torch.no_grad()
def test_equals_upsampling_and_convolution(size, channels, bias) -> None:
    """To the borders, and for a single pixel."""
    batch, height, width = size
    conv = nn.Conv2d(*channels, 3, padding=1, bias=bias).double()
    small = torch.randn(batch, channels[0], height, width, dtype=torch.float64)
    expected = conv(nn.functional.interpolate(small, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(UpsampledConv(conv)(small), expected)


@torch.no_grad()
def test_a_vaes_decoder_gives_the_same(model_dir: Path) -> None:
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae").eval()
    latents = torch.randn(2, 4, 8, 8)
    expected = vae.decoder(latents)
    upsamplings = sum(isinstance(module, Upsample2D) for module in vae.decoder.modules())
    assert fold_upsampling(vae.decoder) == upsamplings > 0
    assert not [module for module in vae.decoder.modules() if isinstance(module, Upsample2D)]
    torch.testing.assert_close(vae.decoder(latents), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tiny_decoder_gives_the_same() -> None:
    tiny = AutoencoderTiny(decoder_block_out_channels=(8, 8, 8, 8)).eval()
    latents = torch.randn(1, 4, 4, 4)
    expected = tiny.decoder.layers(latents)
    assert fold_upsampling(tiny.decoder.layers) == 3
    torch.testing.assert_close(tiny.decoder.layers(latents), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Upsample(scale_factor=2), nn.ReLU()],
        [nn.Upsample(scale_factor=3), nn.Conv2d(4, 4, 3, padding=1)],
        [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, stride=2)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, dilation=2)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 5, padding=1)],
        [Upsample2D(4, use_conv=True, use_conv_transpose=True)],
        [Upsample2D(4, use_conv=False)],
        [Upsample2D(4, use_conv=True, norm_type="ln_norm", elementwise_affine=True)],
    ],
)
def test_what_is_built_otherwise_stays(layers: list[nn.Module]) -> None:
    decoder = nn.Sequential(*layers)
    assert fold_upsampling(decoder) == 0
    assert list(decoder) == layers
