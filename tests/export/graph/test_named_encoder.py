"""Names and masks of text encoders in an export, whatever version of transformers is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.graph.modules import NamedTextEncoder
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.models.text_context import text_module
from hipa_deploy.models.text_pair import pair_context
from hipa_deploy.models.weights.load_part import load_part
from tests.tiny_sdxl import make_sdxl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture
def parts(model: Path) -> ChosenParts:
    return ChosenParts(ModelParts.open(str(model)), "generate")


def test_names_of_an_exports_encoder(
    model: Path, parts: ChosenParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are named by them, and an adaptor's swap must fit whatever exported the bundle."""
    inner = text_module(load_part(CLIPTextModel, model / "text_encoder"))
    names = []
    # As transformers has it since 5.6, and as before.
    for encoder in (inner, NamedTextEncoder(inner)):
        monkeypatch.setattr(ModelParts, "text_encoder", lambda _, made=encoder: made)
        names.append([name for name, _ in parts.text_encoder().named_parameters()])
    assert names[0] == names[1]
    assert all(name.startswith("text_model.") for name in names[0])


def test_the_second_encoder_keeps_its_names(model: Path, parts: ChosenParts) -> None:
    plain = load_part(CLIPTextModelWithProjection, model / "text_encoder_2")
    own = [name for name, _ in parts.text_encoder_2().named_parameters()]
    assert own == [name for name, _ in plain.named_parameters()]
    assert "text_projection.weight" in own
    assert "text_model.final_layer_norm.weight" in own


def test_the_mask_is_of_numbers(parts: ChosenParts) -> None:
    """One of truth values would give a graph other operators."""
    tokens = torch.arange(77)[None]
    for encoder in (parts.text_encoder(), parts.text_encoder_2()):
        seen: list[Any] = []

        def watch(_: object, inputs: tuple, settings: dict[str, Any], seen: list = seen) -> None:
            seen.extend([*inputs, *settings.values()])

        first = text_module(encoder).encoder.layers[0]
        first.register_forward_pre_hook(watch, with_kwargs=True)
        with torch.no_grad():
            encoder(tokens)
        masks = [value for value in seen if isinstance(value, torch.Tensor) and value.dim() == 4]
        (mask_11LL,) = masks
        assert mask_11LL.dtype == torch.float32
        least = torch.finfo(torch.float32).min
        assert torch.equal(mask_11LL[0, 0], torch.full((77, 77), least).triu(1))


def test_what_the_encoders_give_is_what_the_model_gives(model: Path, parts: ChosenParts) -> None:
    plain = (
        load_part(CLIPTextModel, model / "text_encoder"),
        load_part(CLIPTextModelWithProjection, model / "text_encoder_2"),
    )
    tokens = torch.arange(154).remainder(512)[None]
    with torch.no_grad():
        expected = pair_context(*plain, tokens, tokens + 1, 77)
        got = parts.pair_context(parts.text_pair(), tokens, tokens + 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
