"""Text encoders of transformers before and since 5.6: modules, files and LoRA names of both.

Before, CLIPTextModel holds its parts in ``text_model``. Since then it has them itself. The inner
module of the former is as the latter, so that both are tested with either version installed.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from hipa_deploy.export.graph.modules import NamedTextEncoder, named_encoder
from hipa_deploy.models.lora.lora_file import read_lora
from hipa_deploy.models.lora.merge_lora import merge_lora, module_names
from hipa_deploy.models.single_file import SDXL_PARTS, TEXT, _current_name, _store_usual_names
from hipa_deploy.models.text_context import text_context, text_module
from hipa_deploy.models.weights.load_part import load_part
from hipa_deploy.models.weights.weight_identity import weights_identity
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl
from tests.usual_layout import store_as_5

LAYER = "text_model.encoder.layers.1.mlp.fc1"
PAIR = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
}
NAMES = {
    "kohya": f"lora_te_{LAYER.replace('.', '_')}",
    "kohya, bare": f"lora_te_{LAYER.removeprefix('text_model.').replace('.', '_')}",
    "diffusers": f"text_encoder.{LAYER}",
    "diffusers, bare": f"text_encoder.{LAYER.removeprefix('text_model.')}",
    "peft": f"base_model.model.{LAYER}",
    "peft, bare": f"base_model.model.{LAYER.removeprefix('text_model.')}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first text encoder has three layers."""
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def encoders(model: Path) -> dict[str, Any]:
    loaded = load_part(CLIPTextModel, model / "text_encoder")
    bare = text_module(loaded)
    return {"before 5.6": NamedTextEncoder(bare), "since 5.6": bare}


def test_one_of_both_is_what_is_installed(model: Path, encoders: dict[str, Any]) -> None:
    loaded = load_part(CLIPTextModel, model / "text_encoder")
    names = [name for name, _ in loaded.named_parameters()]
    of_both = [[name for name, _ in encoder.named_parameters()] for encoder in encoders.values()]
    assert names in of_both


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_the_context_is_the_same(encoders: dict[str, Any], clip_skip: int) -> None:
    tokens = torch.arange(77)[None]
    contexts = {}
    for version, encoder in encoders.items():
        with torch.no_grad():
            contexts[version] = text_context(encoder, tokens, 77, clip_skip)

        # As an export leaves layers out.
        fewer = copy.deepcopy(encoder)
        inner = text_module(fewer).encoder
        inner.layers = inner.layers[: 3 - clip_skip]
        with torch.no_grad():
            shorter = text_context(named_encoder(fewer), tokens, 77)
        torch.testing.assert_close(shorter, contexts[version], rtol=0, atol=0)
    torch.testing.assert_close(*contexts.values(), rtol=0, atol=0)


@pytest.mark.parametrize("version", ["before 5.6", "since 5.6"])
@pytest.mark.parametrize("layout", NAMES)
def test_every_name_of_a_lora_finds_its_layer(
    encoders: dict[str, Any], tmp_path: Path, version: str, layout: str
) -> None:
    parts = {"text_encoder": copy.deepcopy(encoders[version])}
    weight = text_module(parts["text_encoder"]).encoder.layers[1].mlp.fc1.weight
    down = torch.randn(2, weight.shape[1])
    up = torch.randn(weight.shape[0], 2)
    expected = weight.detach() + up @ down
    ends = PAIR["kohya" if layout.startswith("kohya") else "peft"]
    path = tmp_path / "style.safetensors"
    save_file({NAMES[layout] + ends[0]: down, NAMES[layout] + ends[1]: up}, path)
    lora = read_lora(path, module_names(parts))
    assert [str(key) for key in lora.layers] == [f"text_encoder.{LAYER}"]
    merge_lora(parts, lora)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [make_model, make_sdxl])
def test_a_folder_of_either_version_is_one_model(make: Callable, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    other = store_as_5(Path(shutil.copytree(folder, tmp_path / "other")))
    stored = [set(load_file(at / "text_encoder/model.safetensors")) for at in (folder, other)]
    assert stored[0].isdisjoint(stored[1])
    assert weights_identity(folder / "text_encoder") == weights_identity(other / "text_encoder")
    first = load_part(CLIPTextModel, folder / "text_encoder").state_dict()
    second = load_part(CLIPTextModel, other / "text_encoder").state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_converted_text_encoder_has_the_names_that_every_version_reads(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    expected = load_file(folder / "text_encoder/model.safetensors")
    store_as_5(folder)
    _store_usual_names(folder / "text_encoder")
    torch.testing.assert_close(load_file(folder / "text_encoder/model.safetensors"), expected)


@pytest.mark.parametrize("prefix", [TEXT, SDXL_PARTS["text_encoder"]])
def test_bare_names_in_a_checkpoint(prefix: str) -> None:
    """A tool that runs beside transformers 5.6 writes the names of its modules."""
    assert _current_name(f"{prefix}final_layer_norm.bias") == (
        f"{prefix}text_model.final_layer_norm.bias"
    )
    assert _current_name(f"{prefix}text_model.final_layer_norm.bias") == (
        f"{prefix}text_model.final_layer_norm.bias"
    )
