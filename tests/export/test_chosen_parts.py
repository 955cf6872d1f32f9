"""The parts of one export: the model's own or tiny ones, the adaptor merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline
from safetensors.torch import save_file

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.export.bundle_files import write_tokenizer
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.generate.prompts import TOKENIZER_2
from hipa_deploy.models.adaptor_folder import WEIGHTS
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.models.style import EmbeddingChoice, Style
from hipa_deploy.models.weights.weight_identity import weights_identity
from tests.packaging import hub_cache
from tests.tiny_controlnet import make_controlnet
from tests.tiny_sdxl import FIRST_WIDTH, SECOND_WIDTH, make_sdxl


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


def test_parts_in_the_cache_of_the_hub_have_the_names_of_their_repositories(
    model_dir: Path, tiny: Path, tmp_path: Path
) -> None:
    """A snapshot's own name is the hash of a commit."""
    decoder = hub_cache(tiny, tmp_path / "tiny-cache")
    controlnet = hub_cache(make_controlnet(model_dir, tmp_path / "edges"), tmp_path / "cache")
    model = ModelParts.open(str(model_dir))
    parts = ChosenParts(
        model, "control", tiny_encoder=decoder, tiny_decoder=decoder, controlnet=controlnet
    )
    control = parts.control_info()
    assert control is not None
    for info in (control, parts.encoder_info(), parts.decoder_info()):
        assert info.name == "owner/name"


def test_every_call_loads_a_part_anew(model_dir: Path) -> None:
    """So that one may be folded while references came from another."""
    parts = ChosenParts(ModelParts.open(str(model_dir)), "generate")
    first, _ = parts.unet()
    with torch.no_grad():
        first.conv_in.weight.zero_()
    second, _ = parts.unet()
    assert second.conv_in.weight.abs().max() > 0


@torch.no_grad()
def test_words_for_both_text_encoders(tmp_path: Path) -> None:
    """The bundle's tokenizers and the encoders, against diffusers with the same file."""
    folder = make_sdxl(tmp_path / "sdxl")
    path = tmp_path / "cat.safetensors"
    content = {"clip_l": torch.randn(5, FIRST_WIDTH), "clip_g": torch.randn(5, SECOND_WIDTH)}
    save_file(content, path)
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(content["clip_l"], token="<cat>")
    pipe.load_textual_inversion(
        content["clip_g"],
        token="<cat>",
        text_encoder=pipe.text_encoder_2,
        tokenizer=pipe.tokenizer_2,
    )

    style = Style(embeddings=(EmbeddingChoice(path, "<cat>"),))
    options = ExportOptions(model=str(folder), out=tmp_path / "b", style=style)
    parts = ChosenParts.choose(ModelParts.open(str(folder)), options, "generate")
    prompt = "a <cat> in red!!"
    first = write_tokenizer(tmp_path, parts.tokenizer(), prompt)
    second = write_tokenizer(tmp_path, parts.tokenizer_2(), prompt, name=TOKENIZER_2)
    tokens = [torch.from_numpy(tokenizer([prompt])) for tokenizer in (first, second)]
    context_BLD, pooled_BP = parts.pair_context(parts.text_pair(), *tokens)
    expected, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    torch.testing.assert_close(context_BLD, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled_BP, pooled, rtol=0, atol=1e-5)
