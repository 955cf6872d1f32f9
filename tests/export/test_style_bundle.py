"""Bundles of a model with LoRAs and embeddings, and swaps of such bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import export_swap, has_other_text
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.generate.swap_stage import swap_text_encoder
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.style import EmbeddingChoice, LoraChoice, Style, StyleInfo
from hipa_deploy.train.evaluation.quality import one_step_images
from tests.export.conftest import make_adaptor
from tests.style_samples import write_embedding, write_lora

PROMPT = "a <cat> with a pear"


@pytest.fixture(scope="module")
def style(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Style:
    """A LoRA of UNet and text encoder, and a word of as many vectors as published ones have."""
    folder = tmp_path_factory.mktemp("style")
    lora = write_lora(model_dir, folder / "style.safetensors", seed=1)
    cat = write_embedding(folder / "cat.safetensors", "<cat>", count=8)
    return Style((LoraChoice(lora, 0.5),), (EmbeddingChoice(cat),))


@pytest.fixture(scope="module")
def bundle(
    model_dir: Path, adaptor_dir: Path, style: Style, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """With an adaptor that was trained on the plain base."""
    out = tmp_path_factory.mktemp("bundle") / "b"
    return export_bundle(
        ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=out, dtype="fp32", style=style)
    )


def test_the_bundle_makes_the_styled_models_images(
    model_dir: Path, adaptor_dir: Path, style: Style, bundle: Bundle
) -> None:
    expected = one_step_images(model_dir, adaptor_dir, [PROMPT], [3], style=style)
    plain = one_step_images(model_dir, adaptor_dir, [PROMPT], [3])
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        result = pipe(PROMPT, seed=3)
    assert np.abs(result.images_BHWC.astype(int) - expected).max() <= 1
    assert np.abs(plain.astype(int) - expected).max() > 1
    (lora,) = bundle.manifest.loras
    assert result.parameters[0]["loras"] == [lora.model_dump(mode="json")]
    assert bundle.manifest.embeddings[0].token == "<cat>"


def test_the_context_is_that_of_diffusers(model_dir: Path, style: Style, bundle: Bundle) -> None:
    """The bundle's tokenizer and text encoder, against a pipeline with the same two files."""
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    pipe.load_textual_inversion(str(style.embeddings[0].path))
    encoder = pipe.text_encoder
    OpenStyle.read(replace(style, embeddings=()), ModelParts.open(str(model_dir)).config).merge(
        {"text_encoder": encoder}
    )
    expected, _ = pipe.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as own:
        tokens_BL = PromptTokenizer(bundle.path("tokenizer/tokenizer.json"))([PROMPT])
        got = own.runners["text_encoder"](tokens=tokens_BL)["context"]
    torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=0, atol=1e-5)


def test_an_adaptor_of_a_styled_model_needs_its_loras(
    model_dir: Path, style: Style, tmp_path: Path
) -> None:
    info = OpenStyle.read(style, ModelParts.open(str(model_dir)).config).info
    adaptor = make_adaptor(model_dir, tmp_path / "styled", loras=info.loras)
    options = ExportOptions(model=str(model_dir), adaptor=adaptor, out=tmp_path / "b")
    with pytest.raises(
        HipaError, match=r"got none\. Give the same files .*: --lora style\.safetensors:0\.5\."
    ):
        export_bundle(options)
    assert not (tmp_path / "b").exists()


def test_words_are_not_for_optimum(model_dir: Path, style: Style, tmp_path: Path) -> None:
    options = ExportOptions(model=str(model_dir), out=tmp_path / "b", layout="generic", style=style)
    with pytest.raises(HipaError, match="--embedding needs --layout onestep"):
        export_bundle(options)


def test_a_swap_keeps_the_bundles_words(
    model_dir: Path, adaptor_dir: Path, style: Style, bundle: Bundle, tmp_path: Path
) -> None:
    options = SwapOptions(
        model=str(model_dir), adaptor=adaptor_dir, bundle=bundle.root, out=tmp_path / "x"
    )
    with pytest.raises(HipaError, match=r"Give them too: --embedding cat\.safetensors:<cat>\."):
        export_swap(options)
    other = EmbeddingChoice(write_embedding(tmp_path / "o.safetensors", "<o>", count=1))
    with pytest.raises(HipaError, match="does not have these embeddings"):
        export_swap(replace(options, style=replace(style, embeddings=(other,))))
    assert not (tmp_path / "x").exists()


def test_a_lora_of_the_unet_alone_is_swapped_in(
    model_dir: Path, adaptor_dir: Path, style: Style, bundle: Bundle, tmp_path: Path
) -> None:
    """One more LoRA, and no text encoder in the swap: the image is PyTorch's of the styled model.

    That a swapped UNet is the own export's, to the byte, is test_export_swap.py's.
    """
    more = write_lora(model_dir, tmp_path / "more.safetensors", seed=2, parts=("unet",))
    both = replace(style, loras=(*style.loras, LoraChoice(more, 0.6)))
    swap = export_swap(
        SwapOptions(
            model=str(model_dir),
            adaptor=adaptor_dir,
            bundle=bundle.root,
            out=tmp_path / "swap",
            style=both,
        )
    )
    assert swap.manifest.text is None
    expected = one_step_images(model_dir, adaptor_dir, [PROMPT], [1], style=both)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        before = pipe(PROMPT, seed=1)
        pipe.swap_adaptor(tmp_path / "swap")
        swapped = pipe(PROMPT, seed=1)
        pipe.swap_adaptor(None)
        again = pipe(PROMPT, seed=1)
    assert np.abs(swapped.images_BHWC.astype(int) - expected).max() <= 1
    assert np.abs(before.images_BHWC.astype(int) - expected).max() > 1
    np.testing.assert_array_equal(again.images_BHWC, before.images_BHWC)
    assert again.parameters == before.parameters
    names = [lora["name"] for lora in swapped.parameters[0]["loras"]]
    assert names == ["style.safetensors", "more.safetensors"]


@pytest.mark.thorough
@pytest.mark.slow
def test_a_lora_is_swapped_in_as_its_own_export_has_it(
    model_dir: Path, adaptor_dir: Path, style: Style, bundle: Bundle, tmp_path: Path
) -> None:
    """One more LoRA, on the text encoder alone; and the bundle's own again after it."""
    more = write_lora(model_dir, tmp_path / "more.safetensors", seed=2, parts=("text_encoder",))
    both = replace(style, loras=(*style.loras, LoraChoice(more, 0.6)))
    swap = export_swap(
        SwapOptions(
            model=str(model_dir),
            adaptor=adaptor_dir,
            bundle=bundle.root,
            out=tmp_path / "swap",
            style=both,
        )
    )
    assert swap.manifest.text is not None
    own = export_bundle(
        ExportOptions(
            model=str(model_dir), adaptor=adaptor_dir, out=tmp_path / "b", dtype="fp32", style=both
        )
    )
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        before = pipe(PROMPT, seed=1)
        pipe.swap_adaptor(tmp_path / "swap")
        swapped = pipe(PROMPT, seed=1)
        pipe.swap_adaptor(None)
        again = pipe(PROMPT, seed=1)
    with OneStepPipeline.load(own.root, "onnxruntime") as pipe:
        direct = pipe(PROMPT, seed=1)
    np.testing.assert_array_equal(swapped.images_BHWC, direct.images_BHWC)
    # But for the names of the two bundles.
    own_facts = {name: direct.parameters[0][name] for name in ("bundle", "bundle_name")}
    assert swapped.parameters[0] | own_facts == direct.parameters[0]
    assert (swapped.images_BHWC != before.images_BHWC).any()
    np.testing.assert_array_equal(again.images_BHWC, before.images_BHWC)
    assert again.parameters == before.parameters
    names = [lora["name"] for lora in swapped.parameters[0]["loras"]]
    assert names == ["style.safetensors", "more.safetensors"]
    assert swap.manifest.parity == own.stages["unet"].parity


def test_a_text_encoder_on_an_engine(bundle: Bundle) -> None:
    with pytest.raises(HipaError, match=r"which backend rtx cannot take\. Use --backend onnx"):
        swap_text_encoder(bundle, "rtx", None)


def test_a_closed_set_keeps_its_contexts(bundle: Bundle) -> None:
    """Without a text encoder, a LoRA on the UNet alone is all that a swap may change."""
    manifest = bundle.manifest
    closed = replace(bundle, manifest=manifest.model_copy(update={"stages": manifest.stages[1:]}))
    assert not has_other_text(closed, StyleInfo(loras=manifest.loras))
    with pytest.raises(HipaError, match=r"which style\.safetensors would change\. Export a bundle"):
        has_other_text(closed, StyleInfo())
