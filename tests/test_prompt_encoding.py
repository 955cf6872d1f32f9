"""Training, export and runtime encode a prompt alike: the same ids, and contexts within 1e-5.

The expected contexts come from transformers and diffusers, called here by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_swap import SwapOptions, export_swap
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.clip_tokenizer import load_tokenizer
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import LoraChoice, Style
from hipa_deploy.models.text_context import text_module
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from tests.export.conftest import make_adaptor
from tests.style_samples import write_lora
from tests.tiny_model import make_model
from tests.usual_layout import store_as_4

# The tiny tokenizer has a token for each byte: the second is longer than one chunk, the third is
# one chunk to the token.
LONG = "a photograph of an astronaut riding a horse, in the style of a woodcut, with a red moon"
PROMPTS = ["", LONG, "w" * 75, "東京の夜景 👩\u200d👧", "\u200ba  cat\tand\na dog"]
LAYERS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose text encoder has several layers, and a final norm that is not 1 and 0."""
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny")
    torch.manual_seed(0)
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    config.num_hidden_layers = LAYERS
    encoder = CLIPTextModel(config)
    norm = text_module(encoder).final_layer_norm
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    torch.nn.init.normal_(norm.bias, mean=-0.2, std=0.2)
    encoder.save_pretrained(folder / "text_encoder")
    return store_as_4(folder)


def export(model_dir: Path, out: Path, **options: Any) -> Bundle:
    return export_bundle(ExportOptions(model=str(model_dir), out=out, dtype="fp32", **options))


@pytest.fixture(scope="module")
def long_bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(model_dir, tmp_path_factory.mktemp("bundle") / "long", context_tokens=154)


@pytest.fixture(scope="module")
def long_pipe(long_bundle: Bundle) -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load(long_bundle.root, "onnxruntime") as pipe:
        yield pipe


def runtime_context(pipe: OneStepPipeline, prompt: str) -> np.ndarray:
    return pipe.tensors(prompt)["context"][0]


@torch.no_grad()
def expected_context(model_dir: Path, prompt: str, chunks: int) -> np.ndarray:
    """By the published rule: chunks of 75 tokens, each encoded like a prompt of its own."""
    tokenizer = load_tokenizer(ModelConfig.read(model_dir))
    encoder = CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder").eval()
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = tokenizer.bos_token_id
    end = tokenizer.eos_token_id
    contexts = []
    for number in range(chunks):
        row = [start, *ids[75 * number : 75 * (number + 1)], end]
        row += [tokenizer.pad_token_id] * (77 - len(row))
        contexts.append(encoder(torch.tensor([row])).last_hidden_state[0])
    return torch.cat(contexts).numpy()


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_long_contexts_are_those_of_the_published_rule(
    model_dir: Path, long_bundle: Bundle, long_pipe: OneStepPipeline, prompt: str
) -> None:
    settings = TextSettings(context_tokens=154)
    model = DiffusionModel.load(model_dir, "cpu", text=settings)
    in_bundle = PromptTokenizer(long_bundle.path("tokenizer/tokenizer.json"), 154)
    assert model.tokenizer([prompt]).tolist() == in_bundle([prompt]).tolist()

    expected = expected_context(model_dir, prompt, 2)
    assert expected.shape == (154, 16)
    np.testing.assert_allclose(model.context([prompt])[0].numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(runtime_context(long_pipe, prompt), expected, atol=1e-5)


def test_the_manifest_says_the_length(long_bundle: Bundle) -> None:
    assert long_bundle.manifest.text.context_tokens == 154
    assert long_bundle.stages["text_encoder"].spec.inputs[0].shape == (1, 154)
    assert long_bundle.stages["unet"].spec.inputs[-1].shape == (1, 154, 16)


def test_two_chunks_hold_150_tokens(long_pipe: OneStepPipeline) -> None:
    assert long_pipe("w" * 150).images
    with pytest.raises(HipaError, match=r"155 tokens, the model reads 154.*--context-tokens 231"):
        long_pipe("w" * 151)


@pytest.mark.parametrize("tokens", [78, 308])
def test_lengths_that_do_not_fit(model_dir: Path, tmp_path: Path, tokens: int) -> None:
    with pytest.raises(HipaError, match="Expected one of: 77, 154, 231"):
        export(model_dir, tmp_path / "b", context_tokens=tokens)
    with pytest.raises(HipaError, match="Expected one of: 77, 154, 231"):
        DiffusionModel.load(model_dir, "cpu", text=TextSettings(context_tokens=tokens))


def test_the_generic_layout_has_one_chunk(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="--context-tokens needs --layout onestep"):
        export(model_dir, tmp_path / "b", context_tokens=154, layout="generic")


@pytest.mark.thorough
def test_a_closed_set_of_long_prompts(
    model_dir: Path, long_pipe: OneStepPipeline, tmp_path: Path
) -> None:
    """One graph for two images a call, and contexts of three chunks."""
    (tmp_path / "prompts.txt").write_text(f"a cat\n{LONG}\n", encoding="utf-8")
    bundle = export(
        model_dir, tmp_path / "b", context_tokens=231, prompts=tmp_path / "prompts.txt", batch=2
    )
    contexts_NLD = np.load(bundle.path("prompts/contexts.npy"))
    np.testing.assert_allclose(contexts_NLD[1], expected_context(model_dir, LONG, 3), atol=1e-5)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        assert len(pipe(LONG, count=2).images) == 2


@torch.no_grad()
def expected_weighed(model_dir: Path) -> np.ndarray:
    """'a (red:1.5) cat' in one chunk, by the web UI's formula, from transformers' own parts."""
    encoder = CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder").eval()
    tokenizer = load_tokenizer(ModelConfig.read(model_dir))
    ids = []
    multipliers = []
    for text, weight in (("a", 1.0), ("red", 1.5), ("cat", 1.0)):
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        multipliers += [weight] * len(piece)
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (77 - len(row))
    z = encoder(torch.tensor([row])).last_hidden_state
    factors = torch.tensor([[1.0, *multipliers, *[1.0] * (76 - len(multipliers))]])
    weighed = z * factors[..., None]
    return (weighed * (z.mean() / weighed.mean()))[0].numpy()


def test_weights_in_training_and_in_the_runtime(
    model_dir: Path, long_pipe: OneStepPipeline
) -> None:
    prompt = "a (red:1.5) cat"
    expected = expected_weighed(model_dir)
    settings = TextSettings(context_tokens=154, prompt_weights=True)
    model = DiffusionModel.load(model_dir, "cpu", text=settings)
    trained = model.context([prompt, "a dog"])[0].numpy()
    np.testing.assert_allclose(trained[:77], expected, atol=1e-5)
    context = long_pipe.tensors(prompt, prompt_weights=True)["context"][0]
    np.testing.assert_allclose(context, trained, atol=1e-5)

    # Brackets are text unless a caller asks, and the parameters of an image say which it was.
    assert np.abs(runtime_context(long_pipe, prompt) - trained).max() > 1e-3
    weighed = long_pipe(prompt, prompt_weights=True)
    assert weighed.parameters[0]["prompt_weights"] is True
    plain = long_pipe(prompt)
    assert plain.parameters[0]["prompt_weights"] is False
    assert not np.array_equal(plain.images_BHWC, weighed.images_BHWC)
    again = long_pipe([prompt, "a cat"], prompt_weights=True)
    assert np.array_equal(again.images_BHWC[0], weighed.images_BHWC[0])


def test_a_closed_set_with_weights(model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.5) cat\na (red:1.2.3) cat\n", encoding="utf-8")
    with pytest.raises(HipaError, match=r"prompts\.txt, line 2: ':1\.2\.3\)' in the prompt"):
        export(model_dir, tmp_path / "b", prompts=prompts, prompt_weights=True)
    prompts.write_text("a (red:1.5) cat\n", encoding="utf-8")
    bundle = export(model_dir, tmp_path / "b", prompts=prompts, prompt_weights=True)
    assert bundle.manifest.text == TextSettings(context_tokens=77, prompt_weights=True)
    contexts_NLD = np.load(bundle.path("prompts/contexts.npy"))
    np.testing.assert_allclose(contexts_NLD[0], expected_weighed(model_dir), atol=1e-5)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        assert pipe("a (red:1.5) cat").parameters[0]["prompt_weights"] is True


@torch.no_grad()
def diffusers_context(model_dir: Path, prompts: list[str], clip_skip: int | None) -> np.ndarray:
    """diffusers' own, with the tokenizer that the bundle has."""
    pipe = StableDiffusionPipeline.from_pretrained(model_dir, tokenizer=None)
    # diffusers 0.42 asks for text_model with any version of transformers. As a plain value, because
    # the module would hold itself.
    vars(pipe.text_encoder).setdefault("text_model", text_module(pipe.text_encoder))
    pipe.tokenizer = load_tokenizer(ModelConfig.read(model_dir))
    encoded = pipe.encode_prompt(prompts, "cpu", 1, False, clip_skip=clip_skip)
    context_BLD: np.ndarray = encoded[0].numpy()
    return context_BLD


@pytest.mark.parametrize("clip_skip", range(LAYERS))
def test_clip_skip_in_training_is_that_of_diffusers(model_dir: Path, clip_skip: int) -> None:
    prompts = ["a red apple", "東京の夜景", ""]
    model = DiffusionModel.load(model_dir, "cpu", text=TextSettings(clip_skip=clip_skip))
    expected = diffusers_context(model_dir, prompts, clip_skip)
    np.testing.assert_allclose(model.context(prompts).numpy(), expected, atol=1e-5)
    if clip_skip == 0:
        without = diffusers_context(model_dir, prompts, None)
        np.testing.assert_allclose(expected, without, atol=1e-6)


def test_a_clip_skip_that_leaves_no_layer(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="leaves no layer: this model's text encoder has 3"):
        DiffusionModel.load(model_dir, "cpu", text=TextSettings(clip_skip=LAYERS))
    with pytest.raises(HipaError, match="leaves no layer"):
        export(model_dir, tmp_path / "b", clip_skip=LAYERS)


@pytest.mark.slow
def test_an_adaptor_brings_its_text_settings(model_dir: Path, tmp_path: Path) -> None:
    """Long prompts, clip skip and weights, all at once, from the adaptor to the runtime."""
    text = TextSettings(context_tokens=154, clip_skip=1, prompt_weights=True)
    adaptor = make_adaptor(model_dir, tmp_path / "adaptor", text=text)
    assert read_metadata(adaptor, model_dir).text == text
    with pytest.raises(HipaError, match=r"trained with clip skip 1, not 0\. Leave out --clip-skip"):
        export(model_dir, tmp_path / "b", adaptor=adaptor, clip_skip=0)

    bundle = export(model_dir, tmp_path / "b", adaptor=adaptor)
    assert bundle.manifest.text == text
    layers = (bundle.root / "text_encoder/weights.json").read_text(encoding="utf-8")
    assert "encoder.layers.1." in layers
    assert "encoder.layers.2." not in layers

    model = DiffusionModel.load(model_dir, "cpu", text=text)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        for prompt in PROMPTS:
            np.testing.assert_allclose(
                runtime_context(pipe, prompt), model.context([prompt])[0].numpy(), atol=1e-5
            )
        weighed = f"({LONG}:1.3) [東京]"
        trained = model.context([weighed])[0].numpy()
        np.testing.assert_allclose(runtime_context(pipe, weighed), trained, atol=1e-5)
        expected = diffusers_context(model_dir, ["a cat"], 1)[0]
        np.testing.assert_allclose(runtime_context(pipe, "a cat")[:77], expected, atol=1e-5)

    # Another adaptor for this bundle must have been trained alike.
    other = make_adaptor(model_dir, tmp_path / "other")
    options = SwapOptions(
        model=str(model_dir), adaptor=other, bundle=bundle.root, out=tmp_path / "swap"
    )
    with pytest.raises(HipaError, match=r"clip skip 0, not 1\. Export a bundle of its own"):
        export_swap(options)


@pytest.mark.thorough
@pytest.mark.slow
def test_a_swapped_text_encoder_keeps_the_bundles_text_settings(
    model_dir: Path, tmp_path: Path
) -> None:
    """A LoRA on the text encoder, swapped into a bundle with two chunks and a clip skip."""
    bundle = export(model_dir, tmp_path / "b", context_tokens=154, clip_skip=1)
    lora = write_lora(model_dir, tmp_path / "style.safetensors", seed=1)
    style = Style((LoraChoice(lora, 0.5),))
    export_swap(
        SwapOptions(
            model=str(model_dir),
            adaptor=None,
            bundle=bundle.root,
            out=tmp_path / "swap",
            style=style,
        )
    )
    text = TextSettings(context_tokens=154, clip_skip=1)
    model = DiffusionModel.load(model_dir, "cpu", style=style, text=text)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        before = runtime_context(pipe, LONG)
        pipe.swap_adaptor(tmp_path / "swap")
        swapped = runtime_context(pipe, LONG)
    np.testing.assert_allclose(swapped, model.context([LONG])[0].numpy(), atol=1e-5)
    assert np.abs(swapped - before).max() > 1e-3
