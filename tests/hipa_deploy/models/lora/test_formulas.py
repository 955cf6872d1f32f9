"""Every layer of every kind of LoRA against its format's formula, in numpy and float64.

The expected weights are computed from the file as it lies on disk, by code that shares nothing with
the product: numpy's own loops and products, one layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from hipa_deploy.models.lora.lora_file import read_lora
from hipa_deploy.models.lora.merge_lora import merge_lora, module_names
from tests.tiny_model import make_model

Arrays = dict[str, np.ndarray]
# float32's own rounding, of sums of a few hundred products.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
SCALE = 0.7


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny")
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
    }


def layers(parts: dict[str, torch.nn.Module]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(part, module, shape of the weight) of every linear layer and convolution."""
    found = []
    for part, model in parts.items():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                found.append((part, name, tuple(module.weight.shape)))
    return found


def kohya_name(part: str, module: str) -> str:
    prefix = "lora_unet" if part == "unet" else "lora_te"
    return f"{prefix}_{module.replace('.', '_')}"


class Draw:
    """Random arrays, another one at each call."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        return (self._rng.normal(size=shape) * 0.4).astype(np.float32)

    def alpha(self) -> np.ndarray:
        return np.asarray(self._rng.uniform(0.5, 4), dtype=np.float32)


def lora(name: str, shape: tuple[int, ...], draw: Draw) -> Arrays:
    rank = 1 + len(name) % 3  # layers differ in rank
    kernel = shape[2:]
    return {
        f"{name}.lora_down.weight": draw(rank, shape[1], *kernel),
        f"{name}.lora_up.weight": draw(shape[0], rank, *(1 for _ in kernel)),
        f"{name}.alpha": draw.alpha(),
    }


def lora_change(name: str, file: Arrays) -> np.ndarray:
    down = file[f"{name}.lora_down.weight"].astype(np.float64)
    up = file[f"{name}.lora_up.weight"].astype(np.float64)
    product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return product * float(file[f"{name}.alpha"]) / len(down)


def locon(name: str, shape: tuple[int, ...], draw: Draw) -> Arrays:
    """Tucker: a core between two 1x1 convolutions; layers without a kernel have no core."""
    if shape[2:] in ((), (1, 1)):
        return lora(name, shape, draw)
    return {
        f"{name}.lora_down.weight": draw(2, shape[1], 1, 1),
        f"{name}.lora_mid.weight": draw(2, 2, *shape[2:]),
        f"{name}.lora_up.weight": draw(shape[0], 2, 1, 1),
        f"{name}.alpha": draw.alpha(),
    }


def locon_change(name: str, file: Arrays) -> np.ndarray:
    if f"{name}.lora_mid.weight" not in file:
        return lora_change(name, file)
    down = file[f"{name}.lora_down.weight"].astype(np.float64)[:, :, 0, 0]
    up = file[f"{name}.lora_up.weight"].astype(np.float64)[:, :, 0, 0]
    mid = file[f"{name}.lora_mid.weight"].astype(np.float64)
    change = np.zeros((len(up), down.shape[1], *mid.shape[2:]))
    for y in range(mid.shape[2]):
        for x in range(mid.shape[3]):
            change[:, :, y, x] = up @ mid[:, :, y, x] @ down
    return change * float(file[f"{name}.alpha"]) / len(down)


def loha(name: str, shape: tuple[int, ...], draw: Draw) -> Arrays:
    flat = int(np.prod(shape[1:]))
    tensors = {f"{name}.alpha": draw.alpha()}
    for number in ("1", "2"):
        if len(shape) == 4 and shape[2] > 1:
            tensors[f"{name}.hada_t{number}"] = draw(2, 2, *shape[2:])
            tensors[f"{name}.hada_w{number}_a"] = draw(2, shape[0])
            tensors[f"{name}.hada_w{number}_b"] = draw(2, shape[1])
        else:
            tensors[f"{name}.hada_w{number}_a"] = draw(shape[0], 2)
            tensors[f"{name}.hada_w{number}_b"] = draw(2, flat)
    return tensors


def loha_change(name: str, file: Arrays) -> np.ndarray:
    factors = []
    for number in ("1", "2"):
        a = file[f"{name}.hada_w{number}_a"].astype(np.float64)
        b = file[f"{name}.hada_w{number}_b"].astype(np.float64)
        core = file.get(f"{name}.hada_t{number}")
        if core is None:
            factors.append(a @ b)
            continue
        factor = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
        for y in range(core.shape[2]):
            for x in range(core.shape[3]):
                factor[:, :, y, x] = a.T @ core[:, :, y, x].astype(np.float64) @ b
        factors.append(factor)
    return factors[0] * factors[1] * float(file[f"{name}.alpha"]) / 2


def lokr(name: str, shape: tuple[int, ...], draw: Draw) -> Arrays:
    """First factor 2x2 and whole, or of rank 1; the second whole, of rank 2, or with a core."""
    outputs = shape[0] // 2
    inputs = shape[1] // 2
    tensors = {f"{name}.alpha": draw.alpha()}
    kind = len(name) % 3
    if kind == 0:
        tensors[f"{name}.lokr_w1_a"] = draw(2, 1)
        tensors[f"{name}.lokr_w1_b"] = draw(1, 2)
        tensors[f"{name}.lokr_w2"] = draw(outputs, inputs, *shape[2:])
    elif kind == 1 and len(shape) == 4:
        tensors[f"{name}.lokr_w1"] = draw(2, 2)
        tensors[f"{name}.lokr_t2"] = draw(2, 2, *shape[2:])
        tensors[f"{name}.lokr_w2_a"] = draw(2, outputs)
        tensors[f"{name}.lokr_w2_b"] = draw(2, inputs)
    elif kind == 1:
        tensors[f"{name}.lokr_w1"] = draw(2, 2)
        tensors[f"{name}.lokr_w2_a"] = draw(outputs, 2)
        tensors[f"{name}.lokr_w2_b"] = draw(2, inputs)
    else:
        tensors[f"{name}.lokr_w1"] = draw(2, 2)
        tensors[f"{name}.lokr_w2"] = draw(outputs, inputs, *shape[2:])
    return tensors


def lokr_change(name: str, file: Arrays) -> np.ndarray:
    def get(role: str) -> np.ndarray | None:
        value = file.get(f"{name}.{role}")
        return None if value is None else value.astype(np.float64)

    rank = None
    w1 = get("lokr_w1")
    if w1 is None:
        w1 = get("lokr_w1_a") @ get("lokr_w1_b")
        rank = 1
    w2 = get("lokr_w2")
    core = get("lokr_t2")
    if w2 is None and core is not None:
        w2 = np.zeros((get("lokr_w2_a").shape[1], get("lokr_w2_b").shape[1], *core.shape[2:]))
        for y in range(core.shape[2]):
            for x in range(core.shape[3]):
                w2[:, :, y, x] = get("lokr_w2_a").T @ core[:, :, y, x] @ get("lokr_w2_b")
        rank = 2
    elif w2 is None:
        w2 = get("lokr_w2_a") @ get("lokr_w2_b")
        rank = 2
    blocks = [[w1[i, j] * w2 for j in range(w1.shape[1])] for i in range(w1.shape[0])]
    change = np.concatenate([np.concatenate(row, axis=1) for row in blocks], axis=0)
    # With both factors whole there is no rank, and LyCORIS takes 1 for alpha / rank.
    return change * (1.0 if rank is None else float(file[f"{name}.alpha"]) / rank)


def full(name: str, shape: tuple[int, ...], draw: Draw) -> Arrays:
    return {f"{name}.diff": draw(*shape)}


def full_change(name: str, file: Arrays) -> np.ndarray:
    return file[f"{name}.diff"].astype(np.float64)


KINDS: dict[str, tuple[Callable, Callable]] = {
    "lora": (lora, lora_change),
    "locon": (locon, locon_change),
    "loha": (loha, loha_change),
    "lokr": (lokr, lokr_change),
    "full": (full, full_change),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_what_its_formula_says(
    parts: dict[str, torch.nn.Module], tmp_path: Path, kind: str
) -> None:
    make, formula = KINDS[kind]
    draw = Draw()
    tensors: Arrays = {}
    # The factors of this file's LoKr are 2x2: the layers of odd widths are left out.
    chosen = [
        layer for layer in layers(parts) if kind != "lokr" or not (layer[2][0] | layer[2][1]) % 2
    ]
    for part, module, shape in chosen:
        tensors |= make(kohya_name(part, module), shape, draw)
    save_file(tensors, tmp_path / "x.safetensors")

    own = copy.deepcopy(parts)
    read = read_lora(tmp_path / "x.safetensors", module_names(own))
    assert len(read.layers) == len(chosen) > 40
    merge_lora(own, read, SCALE)

    file = load_file(tmp_path / "x.safetensors")
    for part, module, shape in chosen:
        base = parts[part].get_submodule(module).weight.detach().double().numpy()
        change = formula(kohya_name(part, module), file).reshape(shape)
        got = own[part].get_submodule(module).weight.detach().numpy()
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(got, base + SCALE * change, **TOLERANCE, err_msg=module)


def test_layers_that_the_file_does_not_name_stay(
    parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    name = kohya_name("unet", "conv_in")
    shape = tuple(parts["unet"].get_submodule("conv_in").weight.shape)
    save_file(lora(name, shape, Draw()), tmp_path / "x.safetensors")
    own = copy.deepcopy(parts)
    merge_lora(own, read_lora(tmp_path / "x.safetensors", module_names(own)))
    for part, model in parts.items():
        for key, value in own[part].state_dict().items():
            same = torch.equal(value, model.state_dict()[key])
            assert same == (key != "conv_in.weight"), key


def test_biases_and_norm_layers_of_lycoris(
    parts: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    """``diff_b`` with a pair and alone; ``w_norm`` and ``b_norm`` are plain differences."""
    draw = Draw()
    conv = parts["unet"].get_submodule("conv_in")
    norm = parts["unet"].get_submodule("conv_norm_out")
    name = kohya_name("unet", "conv_in")
    tensors = lora(name, tuple(conv.weight.shape), draw)
    tensors[f"{name}.diff_b"] = draw(len(conv.bias))
    tensors["lora_unet_conv_out.diff_b"] = draw(len(parts["unet"].get_submodule("conv_out").bias))
    tensors["lora_unet_conv_norm_out.w_norm"] = draw(len(norm.weight))
    tensors["lora_unet_conv_norm_out.b_norm"] = draw(len(norm.bias))
    save_file(tensors, tmp_path / "x.safetensors")
    own = copy.deepcopy(parts)
    merge_lora(own, read_lora(tmp_path / "x.safetensors", module_names(own)), SCALE)
    for place, difference in (
        ("conv_in.bias", f"{name}.diff_b"),
        ("conv_out.bias", "lora_unet_conv_out.diff_b"),
        ("conv_norm_out.weight", "lora_unet_conv_norm_out.w_norm"),
        ("conv_norm_out.bias", "lora_unet_conv_norm_out.b_norm"),
    ):
        base = parts["unet"].get_parameter(place).detach().numpy()
        got = own["unet"].get_parameter(place).detach().numpy()
        np.testing.assert_allclose(got, base + SCALE * tensors[difference], **TOLERANCE)
