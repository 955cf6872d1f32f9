from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.fold import fold_decoder_input, fold_encoder_output, fold_timestep


@pytest.mark.parametrize("timestep", [999, 499, 0])
@torch.no_grad()
def test_folded_equals_general(model_dir: Path, timestep: int) -> None:
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet").eval()
    noise = torch.randn(2, 4, 8, 8)
    context = torch.randn(2, 77, 16)
    expected = unet(noise, timestep, context).sample
    assert fold_timestep(unet, timestep) == 8
    torch.testing.assert_close(
        unet(noise, timestep, context).sample, expected, atol=1e-5, rtol=1e-5
    )
    assert not [name for name, _ in unet.named_parameters() if "time" in name]


@torch.no_grad()
def test_several_timesteps_are_rows_of_a_table(model_dir: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet").eval()
    noise = torch.randn(2, 4, 8, 8)
    context = torch.randn(2, 77, 16)
    timesteps = (999, 499, 0)
    expected = [unet(noise, timestep, context).sample for timestep in timesteps]
    assert fold_timestep(unet, *timesteps) == 8
    alone = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    fold_timestep(alone, timesteps[1])
    row = unet.mid_block.resnets[0].time_emb_proj.bias_KC[1]
    bias = alone.mid_block.resnets[0].conv1.bias
    assert torch.equal(row, bias)
    for index, value in enumerate(expected):
        torch.testing.assert_close(
            unet(noise, torch.tensor([index]), context).sample, value, atol=1e-5, rtol=1e-5
        )
    assert not [name for name, _ in unet.named_parameters() if "time_embedding" in name]


@pytest.mark.parametrize("mixes", [True, False])
@torch.no_grad()
def test_encoder_output_folds(model_dir: Path, mixes: bool) -> None:
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae", use_quant_conv=mixes).eval()
    image = torch.randn(2, 3, 32, 32)
    expected = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
    fold_encoder_output(vae)
    torch.testing.assert_close(vae.encoder(image), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folding_another_timestep_differs(model_dir: Path) -> None:
    noise = torch.randn(1, 4, 8, 8)
    context = torch.randn(1, 77, 16)
    outputs = []
    for timestep in (999, 0):
        unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet").eval()
        fold_timestep(unet, timestep)
        outputs.append(unet(noise, 999, context).sample)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@torch.no_grad()
def test_an_activation_after_the_embedding_folds_too(model_dir: Path) -> None:
    noise = torch.randn(2, 4, 8, 8)
    context = torch.randn(2, 77, 16)
    for timesteps, argument in (((999,), 999), ((999, 499), torch.tensor([0]))):
        unet = UNet2DConditionModel.from_pretrained(
            model_dir, subfolder="unet", time_embedding_act_fn="gelu"
        ).eval()
        expected = unet(noise, 999, context).sample
        fold_timestep(unet, *timesteps)
        torch.testing.assert_close(
            unet(noise, argument, context).sample, expected, atol=1e-5, rtol=1e-5
        )


def test_an_embedding_in_the_norms_cannot_be_folded() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("KDownBlock2D", "KDownBlock2D"),
        up_block_types=("KUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
    )
    with pytest.raises(
        HipaError, match=r"in the norms of its blocks cannot be folded\. Use --layout generic\."
    ):
        fold_timestep(unet, 999)


def test_scale_and_shift_cannot_be_folded() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    with pytest.raises(HipaError, match="scale_shift"):
        fold_timestep(unet, 999)


@pytest.mark.parametrize("mixes", [True, False])
@torch.no_grad()
def test_decoder_input_folds_exactly_to_the_borders(model_dir: Path, mixes: bool) -> None:
    vae = AutoencoderKL.from_pretrained(
        model_dir, subfolder="vae", use_post_quant_conv=mixes
    ).eval()
    if mixes:
        vae.post_quant_conv.bias += 3  # at the border conv_in pads with zeros, not with this
    latents = torch.randn(2, 4, 8, 8)
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    offset = fold_decoder_input(vae)
    torch.testing.assert_close(vae.decoder(latents + offset), expected, atol=1e-4, rtol=1e-4)


def test_a_singular_mix_cannot_be_folded(model_dir: Path) -> None:
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae")
    torch.nn.init.ones_(vae.post_quant_conv.weight)
    with pytest.raises(HipaError, match="post_quant_conv"):
        fold_decoder_input(vae)
