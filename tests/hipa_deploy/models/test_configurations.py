from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from hipa_deploy.export.graph.modules import named_encoder
from hipa_deploy.models.configurations import MODELS, transformer_count, write_config
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.single_file import SDXL_CROSS_ATTENTION
from hipa_deploy.models.weights.part_config import read_config
from hipa_deploy.train.model.unet_adaptor import PAPER, adaptor_parameters, add_adaptor
from tests.original_layout import open_clip_names, unet_names, vae_names

# Parameters of the published weights, and of the adaptor preset 'paper' at rank 16.
PUBLISHED = {
    "sd15": {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "paper": 3_188_736,
    },
    "sd21-base": {
        "unet": 865_910_724,
        "vae": 83_653_863,
        "text_encoder": 340_387_840,
        "paper": 3_319_808,
    },
}
PUBLISHED["sd21-v"] = PUBLISHED["sd21-base"]
# Five more channels of the first convolution, 320 x 3 x 3 each.
for _name, _base in (("sd15-inpainting", "sd15"), ("sd2-inpainting", "sd21-base")):
    PUBLISHED[_name] = {**PUBLISHED[_base], "unet": PUBLISHED[_base]["unet"] + 5 * 320 * 3 * 3}
# SDXL's paper says 2.6 G and 817 M (of both text encoders); SSD-1B's and Vega's cards 1.3 G, and
# 247 + 31 + 460 M of Vega's blocks.
_SDXL = {"vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
PUBLISHED["sdxl"] = {**_SDXL, "unet": 2_567_463_684}
PUBLISHED["ssd-1b"] = {**_SDXL, "unet": 1_331_334_404}
PUBLISHED["vega"] = {**_SDXL, "unet": 745_225_604}
PUBLISHED["sdxl-inpainting"] = {**_SDXL, "unet": 2_567_463_684 + 5 * 320 * 3 * 3}


@pytest.fixture(scope="module", params=MODELS)
def config(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    name = request.param
    return name, write_config(name, tmp_path_factory.mktemp("config") / name)


def models(folder: Path) -> dict[str, torch.nn.Module]:
    """Make the parts of a model on the meta device: shapes without values."""
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(read_config(folder, "unet/config.json")),
            "vae": AutoencoderKL.from_config(read_config(folder, "vae/config.json")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        }
        if (folder / "text_encoder_2").is_dir():
            second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        return parts


def count(weights: object) -> int:
    return sum(weight.numel() for weight in weights)


def test_shapes_are_those_of_the_published_weights(config: tuple[str, Path]) -> None:
    name, folder = config
    ModelConfig.read(folder, "inpaint" if "inpainting" in name else "generate")
    parts = models(folder)
    counts = {part: count(module.parameters()) for part, module in parts.items()}
    if "paper" not in PUBLISHED[name]:
        assert counts == PUBLISHED[name]
        return
    with torch.device("meta"):
        add_adaptor(parts["unet"], targets=PAPER, rank=16, alpha=16, seed=0)
    assert {**counts, "paper": count(adaptor_parameters(parts["unet"]).values())} == PUBLISHED[name]


def test_every_weight_of_the_published_layout_finds_its_place(config: tuple[str, Path]) -> None:
    name, folder = config
    parts = models(folder)
    # The original layout's conversion has the names text_model.* in every version of transformers.
    named = {**parts, "text_encoder": named_encoder(parts["text_encoder"])}
    own = {part: module.state_dict() for part, module in named.items()}
    unet = unet_names(own["unet"])
    vae = vae_names(own["vae"])
    is_sdxl = "text_encoder_2" in parts
    assert f"output_blocks.{8 if is_sdxl else 11}.0.skip_connection.weight" in unet
    transformers = [key for key in unet if key.endswith("attn2.to_k.weight")]
    if is_sdxl:
        assert len(transformers) == transformer_count(name)
        assert SDXL_CROSS_ATTENTION.removeprefix("model.diffusion_model.") in transformers
    else:
        assert "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in unet
    settings = {part: read_config(folder, f"{part}/config.json") for part in ("unet", "vae")}
    prefixed = {f"model.diffusion_model.{key}": weight for key, weight in unet.items()}
    found = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(prefixed, settings["unet"]),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(
            {f"first_stage_model.{key}": weight for key, weight in vae.items()}, settings["vae"]
        ),
    }
    if is_sdxl:
        prefix = "conditioner.embedders.1.model."
        text = open_clip_names(own["text_encoder_2"], prefix)
        found["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            parts["text_encoder_2"], text, prefix
        )
    elif name != "sd15":
        text = open_clip_names(own["text_encoder"])
        found["text_encoder"] = single_file_utils.convert_open_clip_checkpoint(
            parts["text_encoder"], text
        )
    for part, weights in found.items():
        shapes = {key: weight.shape for key, weight in weights.items()}
        assert shapes == {key: weight.shape for key, weight in own[part].items()}


def test_schedule(config: tuple[str, Path]) -> None:
    name, folder = config
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert float(scheduler.alphas_cumprod[999]) == pytest.approx(0.0046601, abs=1e-7)
    assert scheduler.config.prediction_type == ("v_prediction" if name == "sd21-v" else "epsilon")


def test_tokens_are_clips(config: tuple[str, Path]) -> None:
    name, folder = config
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer("a photo of a cat", padding="max_length").input_ids
    assert len(tokenizer) == 49408
    assert tokens[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    pads_with_end = not name.startswith("sd2")
    assert tokens[7:] == [49407 if pads_with_end else 0] * 70
    if (folder / "tokenizer_2").is_dir():
        second = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        assert second("a cat!", padding="max_length").input_ids == [
            49406, 320, 2368, 0, 49407, *[0] * 72
        ]  # fmt: skip
