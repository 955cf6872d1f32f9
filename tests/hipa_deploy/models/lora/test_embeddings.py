"""Textual inversion in every format, against diffusers' ``load_textual_inversion``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextModel

from hipa_deploy.errors import HipaError
from hipa_deploy.models.clip_tokenizer import load_tokenizer
from hipa_deploy.models.lora.embeddings import add_rows, add_tokens, read_embedding
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import EmbeddingChoice
from tests.tiny_model import make_model
from tests.usual_layout import find_as_written, store_as_4

WIDTH = 16
# The word alone, within words, twice, in other letters, beside punctuation, and one vector of it.
TEXTS = [
    "a photo of <Cat> in red",
    "<Cat>",
    "a<Cat>s, <Cat>!",
    "no <cat> here",
    "one <Cat>_1 alone",
    "<zz>  <Cat>\n<zz>",
    "plain words",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def vectors(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def a1111(count: int) -> dict[str, object]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors(count)},
        "name": "inside",
        "step": 500,
        "sd_checkpoint": None,
    }


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("kind", ["diffusers .bin", "diffusers .safetensors", "A1111 .pt"])
def test_contexts_are_those_of_diffusers(
    model_dir: Path, tmp_path: Path, kind: str, count: int
) -> None:
    if kind == "diffusers .bin":
        path = tmp_path / "learned_embeds.bin"
        torch.save({"<Cat>": vectors(count)}, path)
    elif kind == "diffusers .safetensors":
        path = tmp_path / "learned_embeds.safetensors"
        save_file({"<Cat>": vectors(count)}, path)
    else:
        path = tmp_path / "cat.pt"
        torch.save(a1111(count), path)
    other = tmp_path / "other.safetensors"
    save_file({"<zz>": vectors(2)}, other)

    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    find_as_written(pipe.tokenizer)
    pipe.load_textual_inversion(str(path), token="<Cat>")
    pipe.load_textual_inversion(str(other))

    tokenizer = load_tokenizer(ModelConfig.read(model_dir))
    encoder = CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder")
    chosen = (EmbeddingChoice(path, "<Cat>"), EmbeddingChoice(other))
    embeddings = [read_embedding(one, WIDTH) for one in chosen]
    for embedding, ids in zip(embeddings, add_tokens(tokenizer, embeddings), strict=True):
        add_rows(encoder, embedding, ids)

    for text in TEXTS:
        ids = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
        expected, _ = pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        with torch.no_grad():
            torch.testing.assert_close(encoder(ids)[0], expected, rtol=0, atol=1e-5)

    # The tokenizer's file alone knows the words: what a bundle has.
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    assert len([i for i in rust.encode("<Cat>").ids if i > 513]) == count


def test_files_of_emb_params_and_of_the_first_scripts(tmp_path: Path) -> None:
    save_file({"emb_params": vectors(2)}, tmp_path / "EasyWord.safetensors")
    embedding = read_embedding(EmbeddingChoice(tmp_path / "EasyWord.safetensors"), WIDTH)
    assert embedding.tokens == ("EasyWord", "EasyWord_1")
    assert torch.equal(embedding.vectors_ND, vectors(2))

    # CompVis' script saved torch's own container and half precision.
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(1).half())})
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}
    torch.save(content, tmp_path / "old.pt")
    embedding = read_embedding(EmbeddingChoice(tmp_path / "old.pt"), WIDTH)
    assert embedding.token == "old"
    assert embedding.vectors_ND.dtype == torch.float32
    torch.testing.assert_close(embedding.vectors_ND, vectors(1).half().float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": vectors(1), "clip_g": vectors(1)}, "is an embedding for SDXL"),
        ({"<a>": vectors(1), "<b>": vectors(1)}, r"holds <a>, <b>\. Expected one embedding"),
        ({"<a>": torch.zeros(1, 1024)}, r"vectors of width 1024, .* has 16\."),
        ({"<a>": torch.zeros(1, 2, WIDTH)}, r"an embedding of shape \[1, 2, 16\]"),
        ({"<a>": torch.zeros(76, WIDTH)}, r"an embedding of shape \[76, 16\]"),
        ({"<a>": torch.full((1, WIDTH), torch.nan)}, "holds NaN or infinity"),
        ({"<a>": 3}, r"holds <a>\. Expected one embedding"),
        ([1, 2], "holds a list"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(HipaError, match=message):
        read_embedding(EmbeddingChoice(tmp_path / "x.pt"), WIDTH)


def test_no_embedding_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(HipaError, match=r"is no embedding file\. Expected one that ends in"):
        read_embedding(EmbeddingChoice(tmp_path / "x.png"), WIDTH)


def test_a_word_that_is_taken(model_dir: Path, tmp_path: Path) -> None:
    save_file({"emb_params": vectors(1)}, tmp_path / "a.safetensors")
    tokenizer = load_tokenizer(ModelConfig.read(model_dir))
    embedding = read_embedding(EmbeddingChoice(tmp_path / "a.safetensors"), WIDTH)
    with pytest.raises(HipaError, match=r"'a' is a word of the model already\. .*:<a>\."):
        add_tokens(tokenizer, [embedding])


def test_an_embedding_beside_those_that_a_folder_was_saved_with(
    model_dir: Path, tmp_path: Path
) -> None:
    save_file({"<Cat>": vectors(3)}, tmp_path / "cat.safetensors")
    save_file({"<Cat>_big": vectors(2)}, tmp_path / "big.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    find_as_written(pipe.tokenizer)
    pipe.load_textual_inversion(str(tmp_path / "cat.safetensors"))
    pipe.save_pretrained(tmp_path / "saved")
    store_as_4(tmp_path / "saved")
    pipe.load_textual_inversion(str(tmp_path / "big.safetensors"))

    tokenizer = load_tokenizer(ModelConfig.read(tmp_path / "saved"))
    encoder = CLIPTextModel.from_pretrained(tmp_path / "saved", subfolder="text_encoder")
    big = read_embedding(EmbeddingChoice(tmp_path / "big.safetensors"), WIDTH)
    cat = read_embedding(EmbeddingChoice(tmp_path / "cat.safetensors"), WIDTH)
    with pytest.raises(HipaError, match=r"'<Cat>' is a word of the model already\. .*:<Cat-2>\."):
        add_tokens(tokenizer, [cat])
    (ids,) = add_tokens(tokenizer, [big])
    add_rows(encoder, big, ids)
    for text in [*TEXTS, "a <Cat>_big one", "<cat>_big <Cat>"]:
        tokens = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")
        expected, _ = pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        with torch.no_grad():
            got = encoder(tokens.input_ids)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
