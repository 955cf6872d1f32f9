"""Files as people have them: pickled, in peft's folders, for other models; none is half read."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from hipa_deploy.errors import HipaError
from hipa_deploy.models.lora.lora_file import read_lora
from hipa_deploy.models.lora.merge_lora import merge_lora, module_names
from tests.tiny_model import make_model

Q = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny")
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
    }


def pair(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    return {
        f"{name}.lora_down.weight": torch.randn(2, inputs, generator=generator),
        f"{name}.lora_up.weight": torch.randn(outputs, 2, generator=generator),
    }


def merged(parts: dict[str, torch.nn.Module], path: Path) -> dict[str, Tensor]:
    own = copy.deepcopy(parts)
    merge_lora(own, read_lora(path, module_names(own)))
    return {
        f"{part}.{name}": value
        for part, model in own.items()
        for name, value in model.state_dict().items()
    }


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ending", [".bin", ".PT", ".SafeTensors"])
def test_a_pickled_file_and_an_ending_in_capitals(
    parts: dict[str, torch.nn.Module], tmp_path: Path, ending: str
) -> None:
    tensors = pair(f"lora_unet_{Q.replace('.', '_')}", 32, 32)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = merged(parts, tmp_path / "x.safetensors")
    other = tmp_path / f"other{ending}"
    if ending == ".SafeTensors":
        save_file(tensors, other)
    else:
        torch.save(tensors, other)
    assert_equal(merged(parts, other), expected)


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_a_configuration_of_another_lora_beside_it_counts_nothing(
    parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    alone = tmp_path / "alone" / "style.safetensors"
    beside = tmp_path / "beside" / "style.safetensors"
    for path in (alone, beside):
        path.parent.mkdir()
        save_file(pair(f"unet.{Q}", 32, 32), path)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32}
    beside.with_name("adapter_config.json").write_text(json.dumps(config))
    assert_equal(merged(parts, beside), merged(parts, alone))


def test_the_text_encoder_s_attention_as_diffusers_named_it_in_2023(
    parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    layer = "text_model.encoder.layers.0.self_attn"
    early: dict[str, Tensor] = {}
    today: dict[str, Tensor] = {}
    for old, new in (("to_q", "q_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
        for key, value in pair("x", 16, 16).items():
            which = "up" if "lora_up" in key else "down"
            early[f"text_encoder.{layer}.{old}_lora.{which}.weight"] = value
            today[f"text_encoder.{layer}.{new}.lora_{which}.weight"] = value
    save_file(early, tmp_path / "early.safetensors")
    save_file(today, tmp_path / "today.safetensors")
    got = merged(parts, tmp_path / "early.safetensors")
    assert_equal(got, merged(parts, tmp_path / "today.safetensors"))
    own = next(name for name in got if name.endswith("layers.0.self_attn.out_proj.weight"))
    plain = parts["text_encoder"].state_dict()[own.removeprefix("text_encoder.")]
    assert not torch.equal(got[own], plain)


def test_a_pickled_file_runs_no_code(parts: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"x": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "evil.bin")
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(HipaError, match=r"(can|could) run code"):
            merged(parts, tmp_path / name)
    (tmp_path / "cut.pt").write_bytes(b"")
    with pytest.raises(HipaError, match="is damaged"):
        merged(parts, tmp_path / "cut.pt")
    torch.save({"lora": 1}, tmp_path / "number.pt")
    with pytest.raises(HipaError, match="'lora' is a int, no tensor"):
        merged(parts, tmp_path / "number.pt")


def test_an_ip_adapter_is_called_one(parts: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    # As h94/IP-Adapter has them, of the same tensors.
    projection = {"proj.weight": torch.zeros(16, 8), "norm.weight": torch.zeros(4)}
    attention = {"1.to_k_ip.weight": torch.zeros(4, 4)}
    torch.save({"image_proj": projection, "ip_adapter": attention}, tmp_path / "ip.bin")
    flat = {f"image_proj.{name}": value for name, value in projection.items()}
    flat |= {f"ip_adapter.{name}": value for name, value in attention.items()}
    save_file(flat, tmp_path / "ip.safetensors")
    for name in ("ip.bin", "ip.safetensors"):
        with pytest.raises(HipaError, match=rf"{name} is an IP-Adapter, which is not supported"):
            merged(parts, tmp_path / name)


def test_peft_folders_of_both_parts_against_peft(
    parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    """Each folder has an alpha of its own, and patterns."""
    expected = {}
    for number, (part, target) in enumerate((("unet", "to_q"), ("text_encoder", "q_proj"))):
        config = LoraConfig(
            r=4, lora_alpha=2 + number, target_modules=[target], rank_pattern={"mid.*to_q": 2}
        )
        model = get_peft_model(copy.deepcopy(parts[part]), config)
        generator = torch.Generator().manual_seed(number)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        model.save_pretrained(tmp_path / part)
        for name, value in model.merge_and_unload().state_dict().items():
            expected[f"{part}.{name}"] = value
    got = merged(parts, tmp_path)
    assert read_lora(tmp_path, module_names(parts)).parts == ("unet", "text_encoder")
    assert_equal(got, expected)


def test_a_file_of_peft_names_no_part(parts: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    """Of the text encoder alone: its layers say which part it is for."""
    tensors = {
        f"base_model.model.{TEXT}.lora_A.weight": torch.ones(2, 16),
        f"base_model.model.{TEXT}.lora_B.weight": torch.ones(16, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert read_lora(tmp_path, module_names(parts)).parts == ("text_encoder",)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 4, 4), "this is a LoRA for SDXL"),
        (pair("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 4, 4), "LoRA for SDXL"),
        (pair(f"lora_unet_{K.replace('.', '_')}", 32, 2048), "is a LoRA for SDXL: .* 2048 wide"),
        (pair(f"lora_unet_{K.replace('.', '_')}", 32, 1024), "LoRA for SD 2.x: .* 1024 wide"),
        (
            pair(f"unet.{Q}", 32, 32) | pair(f"lora_unet_{Q.replace('.', '_')}", 32, 32),
            rf"two tensors are the down of unet\.{Q}",
        ),
        (
            pair(f"unet.{Q}", 32, 32) | {f"unet.{Q}.set_weight": torch.zeros(32, 32)},
            rf"holds unet\.{Q}\.set_weight, which is no part of a LoRA",
        ),
        (
            pair(f"unet.{Q}", 32, 32) | {f"unet.{Q}.alpha": torch.ones(2)},
            "has an alpha of shape",
        ),
        (
            {
                f"unet.{Q}.lora_down.weight": torch.zeros(0, 32),
                f"unet.{Q}.lora_up.weight": torch.zeros(32, 0),
            },
            "has rank 0",
        ),
        (
            {
                f"unet.{Q}.lokr_w1": torch.zeros(2, 2),
                f"unet.{Q}.lokr_w1_a": torch.zeros(2, 1),
                f"unet.{Q}.lokr_w1_b": torch.zeros(1, 2),
                f"unet.{Q}.lokr_w2": torch.zeros(16, 16),
            },
            "has both lokr_w1 and lokr_w1_a",
        ),
    ],
)
def test_what_is_refused(
    parts: dict[str, torch.nn.Module], tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(HipaError, match=message):
        merged(parts, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "OFT"}, "is a OFT adapter of peft"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "changes the base model too"),
    ],
)
def test_settings_of_peft_that_are_no_plain_lora(
    parts: dict[str, torch.nn.Module], tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    save_file(pair(f"base_model.model.{Q}", 32, 32), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2} | settings))
    with pytest.raises(HipaError, match=message):
        merged(parts, tmp_path)


def test_a_text_part_where_the_unet_alone_may_change(
    parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    save_file(pair(f"text_encoder.{TEXT}", 16, 16), tmp_path / "x.safetensors")
    with pytest.raises(HipaError, match=r"can change the unet alone\. Give it with --lora"):
        merged({"unet": parts["unet"]}, tmp_path / "x.safetensors")
