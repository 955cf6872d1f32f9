"""The parts of one export: the model's own or tiny ones, the adaptor merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.models.adaptor_folder import WEIGHTS
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.models.weights.weight_identity import weights_identity


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(8, 8, 8), num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    return tmp_path / "tiny"


def test_the_models_own_parts(model_dir: Path) -> None:
    model = ModelParts.open(str(model_dir))
    parts = ChosenParts(model, "edit")
    unet, adaptor = parts.unet()
    assert adaptor is None
    assert torch.equal(unet.conv_in.weight, model.unet().conv_in.weight)
    assert isinstance(parts.encoder(), AutoencoderKL)
    assert isinstance(parts.decoder(), AutoencoderKL)
    assert (parts.decoder_info().kind, parts.decoder_info().name) == ("full", "vae")
    assert parts.decoder_info().sha256 == parts.encoder_info().sha256 == vae_sha256(model_dir)
    assert parts.encoder_info().adaptor_sha256 is None


def test_the_adaptor_is_merged_at_its_scale(model_dir: Path, adaptor_dir: Path) -> None:
    model = ModelParts.open(str(model_dir))
    options = ExportOptions(
        model=str(model_dir), out=Path("out"), adaptor=adaptor_dir, adaptor_scale=0.5
    )
    unet, adaptor = ChosenParts.choose(model, options, "generate").unet()
    assert adaptor is not None
    assert (adaptor.scale, adaptor.rank) == (0.5, 4)
    assert adaptor.sha256 == file_sha256(adaptor_dir / WEIGHTS)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(unet.get_parameter(name), model.unet().get_parameter(name))


def test_tiny_parts_take_the_places_of_the_vae(model_dir: Path, tiny: Path) -> None:
    model = ModelParts.open(str(model_dir))
    options = ExportOptions(model=str(model_dir), out=Path("out"), encoder=tiny, decoder=tiny)
    parts = ChosenParts.choose(model, options, "edit")
    assert isinstance(parts.encoder(), AutoencoderTiny)
    assert isinstance(parts.decoder(), AutoencoderTiny)
    for info in (parts.encoder_info(), parts.decoder_info()):
        assert (info.kind, info.name, info.sha256) == ("tiny", "tiny", weights_identity(tiny))


def test_every_call_loads_a_part_anew(model_dir: Path) -> None:
    """So that one may be folded while references came from another."""
    parts = ChosenParts(ModelParts.open(str(model_dir)), "generate")
    first, _ = parts.unet()
    with torch.no_grad():
        first.conv_in.weight.zero_()
    second, _ = parts.unet()
    assert second.conv_in.weight.abs().max() > 0
