"""Textual inversion for SDXL's two text encoders, against diffusers' ``load_textual_inversion``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.models.kind import SECOND
from hipa_deploy.models.lora.embeddings import read_pair_embeddings
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import EmbeddingChoice, Style
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from tests.tiny_sdxl import FIRST_WIDTH, SECOND_WIDTH, make_sdxl
from tests.usual_layout import find_as_written

WIDTHS = (FIRST_WIDTH, SECOND_WIDTH)
TEXTS = ["a photo of <Cat> in red!!", "<Cat>", "a <zz> on <Cat>", "plain words"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


def vectors(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width + count))


def write_pair(path: Path, first: int = 3, second: int = 3) -> Path:
    """A file as kohya's scripts and diffusers' advanced ones write it."""
    save_file({"clip_l": vectors(first, WIDTHS[0]), "clip_g": vectors(second, WIDTHS[1])}, path)
    return path


def write_one(path: Path, width: int, token: str = "<zz>", count: int = 2) -> Path:
    """A file for one encoder, as diffusers' textual_inversion_sdxl.py writes two of."""
    save_file({token: vectors(count, width)}, path)
    return path


def load_with_diffusers(pipe: Any, path: Path, token: str) -> None:
    """How diffusers' documentation loads an SDXL embedding."""
    state = load_file(path)
    encoders = {
        "clip_l": (pipe.text_encoder, pipe.tokenizer),
        "clip_g": (pipe.text_encoder_2, pipe.tokenizer_2),
    }
    for key, (encoder, tokenizer) in encoders.items():
        pipe.load_textual_inversion(
            state[key], token=token, text_encoder=encoder, tokenizer=tokenizer
        )


def test_conditions_are_those_of_diffusers(model: Path, tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "cat.safetensors")
    first = write_one(tmp_path / "learned_embeds.safetensors", WIDTHS[0])
    second = write_one(tmp_path / "learned_embeds_2.safetensors", WIDTHS[1])
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(model)
    find_as_written(pipe.tokenizer)
    find_as_written(pipe.tokenizer_2)
    load_with_diffusers(pipe, pair, "<Cat>")
    pipe.load_textual_inversion(str(first))
    pipe.load_textual_inversion(
        str(second), text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )

    choices = (
        EmbeddingChoice(pair, "<Cat>"),
        EmbeddingChoice(first),
        EmbeddingChoice(second),
    )
    ours = DiffusionModel.load(model, "cpu", style=Style(embeddings=choices))
    assert [(word.token, word.vectors) for word in ours.style.embeddings] == [
        ("<Cat>", 3),
        ("<zz>", 2),
        ("<zz>", 2),
    ]
    got = ours.conditions(TEXTS)
    context, _, pooled, _ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(got.context_BLD, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.pooled_BP, pooled, rtol=0, atol=1e-5)
    plain = DiffusionModel.load(model, "cpu").conditions(TEXTS)
    for part in (slice(0, FIRST_WIDTH), slice(FIRST_WIDTH, None)):
        change = (plain.context_BLD - got.context_BLD)[..., part].abs().amax((1, 2))
        assert (change[:3] > 0.1).all()
        assert change[3] < 1e-5


def test_both_halves_are_read(model: Path, tmp_path: Path) -> None:
    path = write_pair(tmp_path / "cat.safetensors")
    style = OpenStyle.read(Style(embeddings=(EmbeddingChoice(path),)), ModelConfig.read(model))
    assert [embedding.part for embedding in style.embeddings] == ["text_encoder", SECOND]
    assert [embedding.token for embedding in style.embeddings] == ["cat", "cat"]
    assert len(style.info.embeddings) == 1
    assert style.changes_text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": vectors(1, 16)}, r"holds clip_l\. Expected clip_l and clip_g, and no more"),
        ({"clip_g": vectors(1, 24)}, r"holds clip_g\. Expected clip_l and clip_g"),
        (
            {"clip_l": vectors(1, 16), "clip_g": vectors(1, 24), "t5": vectors(1, 32)},
            "Expected clip_l and clip_g, and no more",
        ),
        (
            {"clip_l": vectors(1, 24), "clip_g": vectors(1, 16)},
            r"vectors of width 24, .* encoders have 16 and 24.* 768 \(clip_l\) and 1280 \(clip_g\)",
        ),
        ({"clip_l": vectors(1, 16), "clip_g": vectors(1, 32)}, "vectors of width 32"),
        ({"clip_l": vectors(1, 16), "clip_g": vectors(2, 24)}, "1 vectors for text_encoder and 2"),
        ({"clip_l": vectors(1, 16), "clip_g": torch.full((1, 24), torch.nan)}, "NaN or infinity"),
        ({"clip_l": vectors(1, 16), "clip_g": 3}, "holds a int"),
        ({"clip_l": vectors(1, 16), "clip_g": torch.zeros(1, 2, 24)}, r"shape \[1, 2, 24\]"),
        ({"<a>": vectors(1, 16)}, "'<a>' for text_encoder alone, and the model has two"),
        ({"<a>": vectors(1, 24)}, "'<a>' for text_encoder_2 alone"),
        ({"<a>": vectors(1, 1024)}, "vectors of width 1024"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(HipaError, match=message):
        read_pair_embeddings([EmbeddingChoice(tmp_path / "x.pt")], WIDTHS)


def test_halves_that_do_not_belong_together(model: Path, tmp_path: Path) -> None:
    first = EmbeddingChoice(write_one(tmp_path / "a.safetensors", WIDTHS[0]))
    other = EmbeddingChoice(write_one(tmp_path / "b.safetensors", WIDTHS[1], "<other>"))
    with pytest.raises(HipaError, match="'<zz>' for text_encoder alone"):
        read_pair_embeddings([first, other], WIDTHS)
    with pytest.raises(HipaError, match="both text encoders are 16 wide"):
        read_pair_embeddings([first], (16, 16))
    again = EmbeddingChoice(write_pair(tmp_path / "c.safetensors"), "<zz>")
    second = EmbeddingChoice(write_one(tmp_path / "d.safetensors", WIDTHS[1]))
    with pytest.raises(HipaError, match=r"c\.safetensors: the token '<zz>' is that of"):
        OpenStyle.read(Style(embeddings=(first, second, again)), ModelConfig.read(model))
