"""Configurations within bounds: refused before a library builds anything of them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.schedulers import DPMSolverMultistepScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.part_config import build, known_values, read_config

PATH = Path("unet/config.json")
SD15 = {
    "in_channels": 4,
    "attention_head_dim": [5, 10, 20, 20],
    "layers_per_block": 2,
    "norm_eps": 1e-05,
    "mid_block_type": None,
}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_out_channels", [10**9], "a whole number from 1 to 16384"),
        ("block_out_channels", [], "a list of 1 to 8 numbers"),
        ("block_out_channels", [8] * 9, "a list of 1 to 8 numbers"),
        ("layers_per_block", 10**6, "a whole number from 1 to 32"),
        ("layers_per_block", 0, "a whole number from 1 to 32"),
        ("layers_per_block", None, "a value such as 2"),
        ("transformer_layers_per_block", [0, -1, 0], "a whole number from 0 to 64"),
        ("transformer_layers_per_block", 0.5, "a value such as 1"),
        ("in_channels", -4, "a whole number from 1 to 16384"),
        ("in_channels", "4", "a value such as 4"),
        ("in_channels", True, "a value such as 4"),
        ("in_channels", 4.0, "a value such as 4"),
        ("in_channels", 10**4000, "a whole number from 1 to 16384"),
        ("norm_eps", float("nan"), "a number within 1e+06"),
        ("norm_eps", 1e300, "a number within 1e+06"),
        ("act_fn", 7, "a value such as silu"),
        ("act_fn", "x" * 1000, "a short word"),
        ("act_fn", "a\nb", "a short word"),
        ("attention_head_dim", [[[[8]]]], "a value such as 8"),
        ("attention_head_dim", [8] * 1000, "at most 100 values"),
        ("attention_head_dim", {"a": 1}, "a value such as 8"),
    ],
)
def test_values_beyond_their_limits(key: str, value: Any, expected: str) -> None:
    with pytest.raises(HipaError) as error:
        known_values(UNet2DConditionModel, {key: value}, PATH)
    assert f"has {key}=" in str(error.value)
    assert f"Expected {expected}. Copy the model again." in str(error.value)
    assert len(str(error.value)) < 300


def test_levels_without_attention() -> None:
    """As in SDXL's small ControlNets."""
    values = {"transformer_layers_per_block": [0, 0, 1, 1]}
    assert known_values(ControlNetModel, values, PATH) == values
    weights = build(ControlNetModel, values, PATH).state_dict()
    assert not any(name.startswith("down_blocks.1.attentions.0.transformer") for name in weights)
    assert any(name.startswith("down_blocks.2.attentions.0.transformer") for name in weights)


def test_many_blocks_are_refused_although_each_number_is_allowed() -> None:
    values = {"layers_per_block": 32, "transformer_layers_per_block": 64}
    with pytest.raises(HipaError, match=r"asks for 8192 blocks of layers\. Expected at most 400"):
        known_values(UNet2DConditionModel, values, PATH)


def test_what_a_class_does_not_know_is_left_out() -> None:
    assert known_values(UNet2DConditionModel, {**SD15, "_name_or_path": "x"}, PATH) == SD15
    # transformers would fetch code for this one.
    config = {"hidden_size": 768, "_attn_implementation": "owner/kernels", "auto_map": {"a": "b"}}
    assert known_values(CLIPTextConfig, config, PATH) == {"hidden_size": 768}


def test_a_published_scheduler_with_minus_infinity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lambda_min_clipped": -Infinity, "beta_end": 0.012}')
    config = read_config(tmp_path, "config.json")
    assert known_values(DPMSolverMultistepScheduler, config, PATH) == config
    with pytest.raises(HipaError, match="has beta_end=-inf"):
        known_values(DPMSolverMultistepScheduler, {"beta_end": -float("inf")}, PATH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 100_000, "nests too deep|is not JSON"),
        ('{"in_channels": ' + "9" * 5000 + "}", "is not JSON that can be read"),
        ("[]", "is not JSON of a diffusers folder"),
        (" " * (1 << 21), "Expected at most 1048576"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(HipaError, match=message):
        read_config(tmp_path, "config.json")


def test_what_the_library_refuses_is_one_line() -> None:
    with pytest.raises(HipaError, match=r"config\.json cannot be used: .*Copy the model again\.$"):
        build(UNet2DConditionModel, {"down_block_types": ["x"]}, PATH)
    with pytest.raises(HipaError, match=r"config\.json cannot be used: "):
        build(AutoencoderKL, {"norm_num_groups": 7}, PATH)
    with pytest.raises(HipaError, match=r"config\.json cannot be used: "):
        build(CLIPTextModel, {"hidden_act": "no_such"}, PATH)


def test_the_widest_model_that_is_allowed_is_built_without_memory() -> None:
    started = time.perf_counter()
    module = build(CLIPTextModel, {"hidden_size": 16_384, "num_attention_heads": 1}, PATH)
    assert sum(weight.numel() for weight in module.parameters()) > 10**9
    assert {weight.device.type for weight in module.parameters()} == {"meta"}
    assert time.perf_counter() - started < 20


def test_the_included_model_is_whole() -> None:
    config = json.loads((MODEL / "unet/config.json").read_text())
    known = known_values(UNet2DConditionModel, config, PATH)
    assert set(config) - set(known) <= {"_class_name", "_diffusers_version", "_name_or_path"}
