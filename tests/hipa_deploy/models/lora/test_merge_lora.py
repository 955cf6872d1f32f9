"""Every kind of LoRA against peft, which merges it in other code, and every layout."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.modules import named_encoder
from hipa_deploy.models.lora import merge_lora as merge_module
from hipa_deploy.models.lora.lora_file import read_lora
from hipa_deploy.models.lora.merge_lora import merge_lora, module_names
from tests.tiny_model import make_model

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny")
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def adapted(unet: UNet2DConditionModel, config) -> nn.Module:
    """A peft model whose adapter weights are all random: what peft starts with changes nothing."""
    model = get_peft_model(copy.deepcopy(unet), config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1 + 0.01
    return model


def merged_by_peft(model: nn.Module) -> dict[str, Tensor]:
    return dict(copy.deepcopy(model).merge_and_unload().state_dict())


def merged_here(unet: UNet2DConditionModel, path: Path, scale: float = 1.0) -> dict[str, Tensor]:
    own = copy.deepcopy(unet)
    parts = {"unet": own}
    merge_lora(parts, read_lora(path, module_names(parts)), scale)
    return dict(own.state_dict())


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **TOLERANCE)


CONFIGS: dict[str, Callable[[], object]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "rank and alpha patterns": lambda: LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=TARGETS,
        rank_pattern={"to_q": 2, "mid_block.*conv1": 3},
        alpha_pattern={"to_q": 16, "ff.net.2": 1},
    ),
    "rslora": lambda: LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=TARGETS),
    "bias": lambda: LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=["proj_in"]),
    "loha": lambda: LoHaConfig(r=4, alpha=2, target_modules=TARGETS),
    "loha, effective convolutions": lambda: LoHaConfig(
        r=2, alpha=2, target_modules=["conv1"], use_effective_conv2d=True
    ),
    "lokr": lambda: LoKrConfig(r=2, alpha=1, target_modules=TARGETS),
    "lokr, both factors decomposed": lambda: LoKrConfig(
        r=2, alpha=1, target_modules=TARGETS, decompose_both=True
    ),
    "lokr, effective convolutions": lambda: LoKrConfig(
        r=2, alpha=1, target_modules=["conv1"], use_effective_conv2d=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_merged_as_peft_merges_it(
    unet: UNet2DConditionModel, tmp_path: Path, name: str
) -> None:
    model = adapted(unet, CONFIGS[name]())
    model.save_pretrained(tmp_path)
    expected = merged_by_peft(model)
    assert any(not torch.equal(expected[key], value) for key, value in unet.state_dict().items())
    assert_same(merged_here(unet, tmp_path), expected)


def lora_layers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float, int]]:
    """(A, B, alpha, rank) of each layer of a peft model."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            layer = name.removeprefix("base_model.model.")
            down = module.lora_A["default"].weight.detach()
            up = module.lora_B["default"].weight.detach()
            found[layer] = (down, up, module.lora_alpha["default"], module.r["default"])
    return found


def kohya(model: nn.Module) -> dict[str, Tensor]:
    """sd-scripts' layout: underscores for dots, an alpha a layer."""
    tensors = {}
    for layer, (down, up, alpha, _) in lora_layers(model).items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down.contiguous()
        tensors[f"{name}.lora_up.weight"] = up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def diffusers_now(model: nn.Module) -> dict[str, Tensor]:
    """diffusers' layout of today, with an alpha beside each layer's weights."""
    tensors = {}
    for layer, (down, up, alpha, _) in lora_layers(model).items():
        tensors[f"unet.{layer}.lora_A.weight"] = down.contiguous()
        tensors[f"unet.{layer}.lora_B.weight"] = up.contiguous()
        tensors[f"unet.{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


def diffusers_old(model: nn.Module) -> dict[str, Tensor]:
    """diffusers' layout of 2023: the attention processors' own layers; alpha is the rank."""
    tensors = {}
    for layer, (down, up, alpha, rank) in lora_layers(model).items():
        attention, _, projection = layer.removesuffix(".0").rpartition(".")
        name = f"unet.{attention}.processor.{projection}_lora"
        tensors[f"{name}.down.weight"] = down.contiguous()
        tensors[f"{name}.up.weight"] = (up * (alpha / rank)).contiguous()
    return tensors


@pytest.mark.parametrize("layout", [kohya, diffusers_now, diffusers_old])
def test_every_layout_is_the_same_lora(
    unet: UNet2DConditionModel, tmp_path: Path, layout: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    targets = ["to_q", "to_out.0"] if layout is diffusers_old else TARGETS
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=targets,
        alpha_pattern={"to_q": 8},
        rank_pattern={"to_q": 2},
    )
    model = adapted(unet, config)
    save_file(layout(model), tmp_path / "mine.safetensors")
    assert_same(merged_here(unet, tmp_path / "mine.safetensors"), merged_by_peft(model))


def test_half_precision_is_merged_in_float32(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    model = adapted(unet, CONFIGS["lora"]())
    tensors = {name: value.bfloat16() for name, value in kohya(model).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    save_file(
        {name: value.float() for name, value in tensors.items()}, tmp_path / "whole.safetensors"
    )
    half = merged_here(unet, tmp_path / "half.safetensors")
    assert_same(half, merged_here(unet, tmp_path / "whole.safetensors"))


def test_a_convolution_with_a_core_by_hand(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """LoCon's Tucker form, one number at a time."""
    generator = torch.Generator().manual_seed(1)
    layer = "mid_block.resnets.0.conv1"
    weight = unet.get_submodule(layer).weight
    outputs, inputs = weight.shape[:2]
    down = torch.randn(2, inputs, 1, 1, generator=generator)
    mid = torch.randn(2, 2, 3, 3, generator=generator)
    up = torch.randn(outputs, 2, 1, 1, generator=generator)
    name = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    save_file(
        {f"{name}.{role}": value for role, value in tensors.items()}, tmp_path / "t.safetensors"
    )
    got = merged_here(unet, tmp_path / "t.safetensors")[f"{layer}.weight"]
    for o, i, y, x in ((0, 0, 0, 0), (3, 1, 2, 1)):
        change = sum(
            float(up[o, n, 0, 0] * mid[n, m, y, x] * down[m, i, 0, 0])
            for n in (0, 1)
            for m in (0, 1)
        )
        assert float(got[o, i, y, x]) == pytest.approx(float(weight[o, i, y, x]) + change, abs=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_scale_goes_straight_from_the_base_to_the_merged(
    unet: UNet2DConditionModel, tmp_path: Path, name: str
) -> None:
    adapted(unet, CONFIGS[name]()).save_pretrained(tmp_path)
    base = dict(unet.state_dict())
    whole = merged_here(unet, tmp_path)
    half = merged_here(unet, tmp_path, 0.5)
    assert_same(half, {key: base[key] + 0.5 * (whole[key] - base[key]) for key in base})
    assert_same(merged_here(unet, tmp_path, 0.0), base)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


NAME = "lora_unet_mid_block_attentions_0_proj_in"


def pair(outputs: int = 8, inputs: int = 8) -> dict[str, Tensor]:
    return {
        f"{NAME}.lora_down.weight": torch.zeros(2, inputs),
        f"{NAME}.lora_up.weight": torch.zeros(outputs, 2),
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{NAME}.lora_up.weight": torch.zeros(8, 2)},
            "is not whole: it has up, and down is missing",
        ),
        (pair() | {"extra": torch.zeros(1)}, "holds extra, which is no part of a LoRA"),
        (
            {"lora_unet_no_such_layer.lora_down.weight": torch.zeros(1)},
            "no layer lora_unet_no_such_layer",
        ),
        (pair(7, 9), r"the file changes \[7, 9\] values, the model's weight is"),
        (pair() | {f"{NAME}.lora_up.weight": torch.zeros(8, 3)}, "do not fit each other"),
        (pair() | {f"{NAME}.alpha": torch.tensor(float("nan"))}, "holds NaN or infinity"),
        (
            {f"{NAME}.lokr_w1": torch.zeros(2, 2), f"{NAME}.lokr_w2_a": torch.zeros(2, 2)},
            "lokr_w2 is missing",
        ),
        ({f"{NAME}.alpha": torch.tensor(1.0)}, "holds alpha, which is no LoRA"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    unet: UNet2DConditionModel, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(HipaError, match=message):
        merged_here(unet, write(tmp_path / "x.safetensors", tensors))


def test_a_bias_where_the_layer_has_none(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    outputs, inputs = unet.get_submodule(layer).weight.shape
    tensors = {
        f"unet.{layer}.lora_A.weight": torch.zeros(2, inputs),
        f"unet.{layer}.lora_B.weight": torch.zeros(outputs, 2),
        f"unet.{layer}.lora_B.bias": torch.ones(outputs),
    }
    with pytest.raises(
        HipaError, match="the file changes its bias, and the model's layer has none"
    ):
        merged_here(unet, write(tmp_path / "x.safetensors", tensors))


def test_a_layer_that_does_not_fit_changes_nothing(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    model = adapted(unet, LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"]))
    path = write(tmp_path / "x.safetensors", kohya(model) | pair(7, 9))
    own = copy.deepcopy(unet)
    parts = {"unet": own}
    with pytest.raises(HipaError, match="It is for another model"):
        merge_lora(parts, read_lora(path, module_names(parts)))
    assert_same(dict(own.state_dict()), dict(unet.state_dict()))


def test_the_new_weights_of_all_layers_are_never_in_memory_at_once(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(unet, LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"]))
    path = write(tmp_path / "x.safetensors", kohya(model))
    changed = merge_module._changed
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []

    def counted(*arguments: Any) -> Any:
        changes = changed(*arguments)
        alive.update(value for _, value in changes)
        counts.append(len(alive))
        return changes

    monkeypatch.setattr(merge_module, "_changed", counted)
    merged_here(unet, path)
    assert len(counts) > 10
    assert max(counts) <= 2  # a layer's, and those of the layer before, which are let go then


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(
    unet: UNet2DConditionModel, tmp_path: Path, scale: float
) -> None:
    adapted(unet, CONFIGS["lora"]()).save_pretrained(tmp_path)
    with pytest.raises(HipaError, match="is not a number"):
        merged_here(unet, tmp_path, scale)


def test_a_configuration_that_cannot_be_read(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    adapted(unet, CONFIGS["lora"]()).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(HipaError, match="is not JSON that can be read"):
        merged_here(unet, tmp_path)


def test_a_text_encoders_part(tmp_path: Path) -> None:
    """Kohya's and diffusers' names of the same layer are one change."""
    folder = make_model(tmp_path / "tiny")
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    weight = named_encoder(encoder).get_submodule(layer).weight
    outputs, inputs = weight.shape
    down = torch.randn(2, inputs)
    up = torch.randn(outputs, 2)
    expected = weight + up @ down
    for name, ends in (
        (f"lora_te_{layer.replace('.', '_')}", ("lora_down.weight", "lora_up.weight")),
        (f"text_encoder.{layer}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
        (f"text_encoder.{layer}", ("lora_A.weight", "lora_B.weight")),
        # What ComfyUI's node "Extract and Save Lora" writes.
        (
            f"text_encoders.clip_l.transformer.{layer}",
            ("lora_down.weight", "lora_up.weight"),
        ),
    ):
        path = tmp_path / "x.safetensors"
        save_file({f"{name}.{ends[0]}": down, f"{name}.{ends[1]}": up}, path)
        own = copy.deepcopy(encoder)
        parts = {"text_encoder": own}
        lora = read_lora(path, module_names(parts))
        assert lora.parts == ("text_encoder",)
        merge_lora(parts, lora)
        merged = named_encoder(own).get_submodule(layer).weight
        torch.testing.assert_close(merged, expected, **TOLERANCE)


def test_a_convolution_of_dylora(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """LyCORIS stores its second matrix as [outputs, rank], and the first with a kernel."""
    layer = "mid_block.resnets.0.conv1"
    name = f"lora_unet_{layer.replace('.', '_')}"
    weight = unet.get_submodule(layer).weight.detach()
    down = torch.randn(4, *weight.shape[1:])
    up = torch.randn(len(weight), 4)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }
    got = merged_here(unet, write(tmp_path / "x.safetensors", tensors))[f"{layer}.weight"]
    expected = weight + torch.einsum("or,rihw->oihw", up, down) / 4
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_lycoris_dora_over_rows_and_over_columns_by_hand(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    layer = "mid_block.attentions.0.proj_in"
    weight = unet.get_submodule(layer).weight.detach()
    rows, columns = weight.shape[:2]
    matrix = weight.reshape(rows, -1)[:, :columns]
    change = torch.ones(rows, 1) @ torch.full((1, columns), 0.25)
    for shape, axis in (((rows, 1), 1), ((1, columns), 0)):
        lengths = torch.rand(shape) + 0.5
        tensors = {
            f"{NAME}.lora_up.weight": torch.ones(rows, 1),
            f"{NAME}.lora_down.weight": torch.full((1, columns), 0.25),
            f"{NAME}.dora_scale": lengths,
        }
        got = merged_here(unet, write(tmp_path / "x.safetensors", tensors))[f"{layer}.weight"]
        changed = matrix + change
        expected = lengths * changed / changed.norm(dim=axis, keepdim=True)
        torch.testing.assert_close(got.reshape(rows, columns), expected, **TOLERANCE)
