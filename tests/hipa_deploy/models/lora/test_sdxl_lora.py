"""LoRAs of SDXL, in kohya's layout: lora_te1, lora_te2, and the UNet under its original names."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.modules import named_encoder
from hipa_deploy.models.lora.early_lora import check_style
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import EmbeddingChoice, LoraChoice, Style
from hipa_deploy.models.weights.load_part import load_part
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

# In a file, and in the diffusers folder.
LAYERS = {
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": (
        "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    ),
    "lora_te2_text_model_encoder_layers_2_self_attn_q_proj": (
        "text_encoder_2.text_model.encoder.layers.2.self_attn.q_proj"
    ),
    "lora_te2_text_projection": "text_encoder_2.text_projection",
    # One ResNet block a level: 1 is the first, 2 the downsampling, 3 the first with attention.
    "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "lora_unet_middle_block_1_transformer_blocks_1_ff_net_2": (
        "unet.mid_block.attentions.0.transformer_blocks.1.ff.net.2"
    ),
    "lora_unet_label_emb_0_0": "unet.add_embedding.linear_1",
    "lora_unet_down_blocks_0_resnets_0_time_emb_proj": "unet.down_blocks.0.resnets.0.time_emb_proj",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture
def parts(model: Path) -> dict[str, torch.nn.Module]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "unet": load_part(UNet2DConditionModel, model / "unet"),
        "text_encoder": named_encoder(load_part(CLIPTextModel, model / "text_encoder")),
        "text_encoder_2": load_part(CLIPTextModelWithProjection, model / "text_encoder_2"),
    }


def write_kohya(parts: dict[str, torch.nn.Module], path: Path) -> dict[str, torch.Tensor]:
    """Write the LoRA; returns the change of each weight, by its place."""
    tensors = {}
    changes = {}
    generator = torch.Generator().manual_seed(1)
    for name, place in LAYERS.items():
        part, _, module = place.partition(".")
        outputs, inputs = parts[part].get_submodule(module).weight.shape
        down = torch.randn(2, inputs, generator=generator)
        up = torch.randn(outputs, 2, generator=generator)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        changes[place] = 0.5 * (up @ down)  # alpha / rank
    save_file(tensors, path)
    return changes


def test_every_layer_is_found_and_changed(
    model: Path, parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    changes = write_kohya(parts, tmp_path / "kohya.safetensors")
    choice = Style(loras=(LoraChoice(tmp_path / "kohya.safetensors", 0.7),))
    check_style(choice, model)
    style = OpenStyle.read(choice, ModelConfig.read(model))
    assert style.info.loras[0].parts == ("unet", "text_encoder_2", "text_encoder")
    assert style.changes_text
    before = copy.deepcopy(parts)
    style.merge(parts)
    for part, module in parts.items():
        for name, weight in module.named_parameters():
            expected = before[part].get_parameter(name)
            change = changes.get(f"{part}.{name.removesuffix('.weight')}")
            if change is not None:
                expected = expected + 0.7 * change
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_layers_that_the_folder_leaves_out_have_no_effect(
    model: Path, parts: dict[str, torch.nn.Module], tmp_path: Path, layout: str
) -> None:
    """A folder says clip skip by num_hidden_layers, and a LoRA has all of CLIP's layers."""
    fewer = Path(shutil.copytree(model, tmp_path / "fewer"))
    path = fewer / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    path = tmp_path / "style.safetensors"

    def write(numbers: tuple[int, ...]) -> Style:
        tensors = {}
        for number in numbers:
            name = f"text_model.encoder.layers.{number}.mlp.fc1"
            ends = ("lora_A.weight", "lora_B.weight")
            prefix = "text_encoder."
            if layout == "kohya":
                name = name.replace(".", "_")
                ends = ("lora_down.weight", "lora_up.weight")
                prefix = "lora_te1_"
            tensors[f"{prefix}{name}.{ends[0]}"] = torch.ones(2, 16)
            tensors[f"{prefix}{name}.{ends[1]}"] = torch.ones(32, 2)
        save_file(tensors, path)
        return Style(loras=(LoraChoice(path),))

    style = OpenStyle.read(write((0, 1, 2)), ModelConfig.read(fewer))
    (lora,) = [lora for lora, _ in style.loras]
    assert [key.module for key in lora.layers] == [
        f"text_model.encoder.layers.{number}.mlp.fc1" for number in (0, 1)
    ]
    # A file of nothing else is still refused.
    with pytest.raises(HipaError, match=r"has no layer .*layers.2.mlp.fc1"):
        OpenStyle.read(write((2,)), ModelConfig.read(fewer))


def test_the_names_of_comfyui(
    model: Path, parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    write_kohya(parts, tmp_path / "kohya.safetensors")
    prefixes = {"lora_unet_": "diffusion_model.", "lora_te1_": "text_encoders.clip_l.transformer."}
    prefixes["lora_te2_"] = "text_encoders.clip_g.transformer."
    renamed = {}
    for name, tensor in load_file(tmp_path / "kohya.safetensors").items():
        layer, _, end = name.partition(".")
        prefix = next(prefix for prefix in prefixes if layer.startswith(prefix))
        module = LAYERS[layer].partition(".")[2]
        renamed[f"{prefixes[prefix]}{module}.{end}"] = tensor
    save_file(renamed, tmp_path / "comfy.safetensors")
    merged = []
    for name in ("kohya", "comfy"):
        choice = Style(loras=(LoraChoice(tmp_path / f"{name}.safetensors"),))
        check_style(choice, model)
        own = copy.deepcopy(parts)
        OpenStyle.read(choice, ModelConfig.read(model)).merge(own)
        merged.append({part: module.state_dict() for part, module in own.items()})
    torch.testing.assert_close(*merged, rtol=0, atol=0)
    small = make_model(tmp_path / "sd15")
    with pytest.raises(HipaError, match="a second text encoder: this is a LoRA for SDXL"):
        check_style(Style(loras=(LoraChoice(tmp_path / "comfy.safetensors"),)), small)


def test_a_lora_of_two_encoders_on_one(parts: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    write_kohya(parts, tmp_path / "kohya.safetensors")
    small = make_model(tmp_path / "sd15")
    with pytest.raises(HipaError, match="LoRA for SDXL"):
        check_style(Style(loras=(LoraChoice(tmp_path / "kohya.safetensors"),)), small)


@pytest.mark.parametrize(
    ("has_pair", "prefix", "family"),
    [(False, "lora_te1", "SDXL"), (True, "lora_te", "SD 1.x"), (True, "lycoris_te", "SD 1.x")],
)
def test_text_layers_are_named_for_a_family(
    model: Path, tmp_path: Path, has_pair: bool, prefix: str, family: str
) -> None:
    """The first encoders of both families have equal shapes, so a file would fit either."""
    name = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 16),
        f"{name}.lora_up.weight": torch.ones(16, 2),
    }
    path = tmp_path / "text.safetensors"
    save_file(tensors, path)
    base = model if has_pair else make_model(tmp_path / "sd15")
    with pytest.raises(HipaError, match=f"is a LoRA for {family}.*, by the name of {prefix}_"):
        check_style(Style(loras=(LoraChoice(path),)), base)


def test_an_embedding_for_two_encoders_on_one(tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 24)}, path)
    small = make_model(tmp_path / "sd15")
    with pytest.raises(HipaError, match="is an embedding for SDXL"):
        check_style(Style(embeddings=(EmbeddingChoice(path),)), small)
