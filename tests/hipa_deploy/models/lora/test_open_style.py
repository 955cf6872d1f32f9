"""LoRAs and embeddings together, against diffusers' pipeline where diffusers is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from hipa_deploy.errors import HipaError
from hipa_deploy.models.clip_tokenizer import load_tokenizer
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import EmbeddingChoice, LoraChoice, Style
from hipa_deploy.models.text_context import text_module
from tests.style_samples import write_embedding, write_lora
from tests.tiny_model import make_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_the_model_is_the_one_that_diffusers_fuses(model_dir: Path, tmp_path: Path) -> None:
    """Two LoRAs one after the other, the first with a text encoder's part, at scales of their own.

    One rank and one alpha a file: with more, diffusers takes one layer's alpha for all. The first
    file is in diffusers' own layout: of kohya's, it leaves a text encoder's attention out.
    """
    first = write_lora(model_dir, tmp_path / "first.safetensors", seed=1, kohya=False)
    second = write_lora(model_dir, tmp_path / "second.safetensors", seed=2, parts=("unet",))
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    for path, scale in ((first, 0.8), (second, -0.5)):
        pipe.load_lora_weights(str(path))
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()

    style = Style(loras=(LoraChoice(first, 0.8), LoraChoice(second, -0.5)))
    opened = OpenStyle.read(style, ModelConfig.read(model_dir))
    own = StableDiffusionPipeline.from_pretrained(model_dir)
    opened.merge({"unet": own.unet, "text_encoder": own.text_encoder})
    for part in ("unet", "text_encoder"):
        expected = getattr(pipe, part).state_dict()
        for name, weight in getattr(own, part).state_dict().items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    changed = text_module(own.text_encoder).encoder.layers[0].self_attn.q_proj.weight
    plain = StableDiffusionPipeline.from_pretrained(model_dir).text_encoder
    assert not torch.equal(changed, text_module(plain).encoder.layers[0].self_attn.q_proj.weight)


def test_what_a_manifest_says(model_dir: Path, tmp_path: Path) -> None:
    lora = write_lora(model_dir, tmp_path / "style.safetensors", seed=1)
    cat = write_embedding(tmp_path / "cat.safetensors", "<cat>", count=2)
    style = Style((LoraChoice(lora, 0.5),), (EmbeddingChoice(cat),))
    opened = OpenStyle.read(style, ModelConfig.read(model_dir))
    (info,) = opened.info.loras
    assert (info.name, info.scale, info.rank) == ("style.safetensors", 0.5, 2)
    assert info.parts == ("unet", "text_encoder")
    (word,) = opened.info.embeddings
    assert (word.token, word.vectors) == ("<cat>", 2)


def test_no_style_reads_nothing(tmp_path: Path) -> None:
    assert not OpenStyle.read(Style(), None).info  # type: ignore[arg-type]


def test_what_does_not_fit_is_found_before_weights_are_loaded(
    model_dir: Path, tmp_path: Path
) -> None:
    for weights in model_dir.rglob("*.safetensors"):
        assert weights.is_file()
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.zeros(2, 9, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.zeros(16, 2, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    config = ModelConfig.read(model_dir)
    with pytest.raises(HipaError, match=r"the file changes \[16, 9, 3, 3\] values"):
        OpenStyle.read(Style((LoraChoice(tmp_path / "x.safetensors"),)), config)


def test_two_embeddings_of_one_word(model_dir: Path, tmp_path: Path) -> None:
    one = write_embedding(tmp_path / "one.safetensors", "<cat>", count=2)
    two = write_embedding(tmp_path / "two.safetensors", "<cat>_1", count=1)
    style = Style(embeddings=(EmbeddingChoice(one), EmbeddingChoice(two)))
    with pytest.raises(HipaError, match=r"the token '<cat>_1' is that of .*one\.safetensors"):
        OpenStyle.read(style, ModelConfig.read(model_dir))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_word_that_begins_another_is_not_taken_for_it(
    model_dir: Path, tmp_path: Path, swapped: bool
) -> None:
    names = ["bad_prompt_version2", "bad_prompt", "bad"]
    if swapped:
        names.reverse()
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    choices = []
    for name in names:
        path = tmp_path / f"{name}.safetensors"
        # Of one vector each: with several, diffusers takes the beginning for the word itself.
        save_file({"emb_params": torch.randn(1, 16)}, path)
        choices.append(EmbeddingChoice(path))
        pipe.load_textual_inversion(str(path), token=name)
    config = ModelConfig.read(model_dir)
    tokenizer = load_tokenizer(config)
    encoder = CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder")
    OpenStyle.read(Style(embeddings=tuple(choices)), config).add_words(tokenizer, encoder)
    for text in (*names, "a bad_prompt_version2, bad", "bad_prompt, bad_prompt_version2"):
        ids = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
        expected, _ = pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        with torch.no_grad():
            torch.testing.assert_close(encoder(ids)[0], expected)
