"""A tiny SDXL through export and runtime, against StableDiffusionXLPipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import check_request, resolve_request
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.open_stages import open_runner
from hipa_deploy.models.model_config import ModelConfig
from tests.tiny_model import PROMPTS, make_model
from tests.tiny_sdxl import FIRST_WIDTH, SECOND_WIDTH, make_sdxl

MARKED = "a red apple!!"  # SDXL's two tokenizers read exclamation marks differently


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    return export_bundle(ExportOptions(model=str(model), out=out, dtype="fp32"))


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    # Its one step ends at x0, as the bundle's does.
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=0,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("prompt", [MARKED, "", "a (green) pear, " + "very " * 12 + "round"])
def test_the_bundle_gives_the_pipelines_images(bundle: Bundle, reference: Any, prompt: str) -> None:
    with OneStepPipeline.load(bundle.root) as pipe:
        got = pipe.tensors(prompt, seed=3)
        alone = pipe(prompt, seed=3).images_BHWC
        cached = pipe([PROMPTS[0], prompt], seed=3).images_BHWC
    context_BLD, _, _, _ = reference.encode_prompt(prompt, do_classifier_free_guidance=False)
    assert np.abs(context_BLD.numpy() - got["context"]).max() < 1e-5

    request = {
        "prompt": prompt,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "latents": torch.from_numpy(got["noise"]),
    }
    latents = reference(**request, output_type="latent").images.numpy()
    assert np.abs(latents - got["latents"]).max() < 1e-4
    images = (reference(**request, output_type="np").images * 255).round()
    assert np.abs(images - got["images"].astype(np.float64)).max() <= 1
    np.testing.assert_array_equal(alone, got["images"])
    np.testing.assert_array_equal(cached[1:], alone)


@pytest.mark.thorough
@torch.no_grad()
def test_a_tiny_decoder_gives_the_pipelines_images(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    """A folder as TAESDXL's, but with a factor: TAESDXL's own is 1, which hides a factor's loss."""
    torch.manual_seed(1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(8, 8, 8), num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.13025,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "taesdxl")
    bundle = export_bundle(
        ExportOptions(
            model=str(model),
            out=tmp_path / "bundle",
            dtype="fp32",
            task="edit",
            strengths=(0.5,),
            prompts=model / "prompts.txt",
            decoder=tmp_path / "taesdxl",
            encoder=tmp_path / "taesdxl",
        )
    )
    assert bundle.manifest.decoder is not None
    assert bundle.manifest.decoder.kind == "tiny"
    source_HWC = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    with open_runner(bundle, "vae_encoder", "onnxruntime") as runner:
        encoded = runner(image=source_HWC[None])["source"]
    sample = torch.from_numpy(source_HWC).permute(2, 0, 1)[None] / 127.5 - 1
    # As diffusers' pipelines encode an image and decode latents.
    theirs = tiny.encode(sample).latents * tiny.config.scaling_factor
    np.testing.assert_allclose(encoded, theirs.numpy(), atol=1e-5)

    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with open_runner(bundle, "vae_decoder", "onnxruntime") as runner:
        got = runner(latents=latents.numpy())["images"]
    decoded = tiny.decode(latents / tiny.config.scaling_factor).sample
    expected = reference.image_processor.postprocess(decoded, output_type="np") * 255
    assert np.abs(expected.round() - got.astype(np.float64)).max() <= 1


def test_the_stages_say_what_they_are(bundle: Bundle) -> None:
    text = bundle.stages["text_encoder"]
    assert [tensor.name for tensor in text.spec.inputs] == ["tokens", "tokens_2"]
    assert [tensor.name for tensor in text.spec.outputs] == ["context", "conditioning"]
    assert bundle.manifest.text_widths == (FIRST_WIDTH, SECOND_WIDTH)
    unet = bundle.stages["unet"]
    assert [tensor.name for tensor in unet.spec.inputs] == ["noise", "context", "conditioning"]
    weights = json.loads((bundle.root / "unet/weights.json").read_text())["weights"]
    places = {place for weight in weights.values() for place in weight["places"]}
    assert not any("embedding" in place or "time_emb_proj" in place for place in places)
    assert check_bundle(bundle).problems == ()


def test_weights_are_each_encoders_own(bundle: Bundle) -> None:
    """Each part keeps its own mean, as in the web UI, and the pooled vector has no weights."""
    with OneStepPipeline.load(bundle.root) as pipe:
        plain = pipe.tensors("a red apple")
        weighed = pipe.tensors("a (red:1.5) apple", prompt_weights=True)
    np.testing.assert_array_equal(weighed["conditioning"], plain["conditioning"])
    for part in (slice(0, FIRST_WIDTH), slice(FIRST_WIDTH, None)):
        before = plain["context"][..., part]
        after = weighed["context"][..., part]
        assert np.abs(after - before).max() > 0.01
        # A token that weighs 1 is scaled by one number alone, which is this part's own.
        ratio = after[0, 1] / before[0, 1]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.slow
def test_a_closed_set_to_edit_in_fp16(model: Path, tmp_path: Path) -> None:
    """Baked prompts hold the conditioning at each strength."""
    options = ExportOptions(
        model=str(model),
        out=tmp_path / "bundle",
        task="edit",
        strengths=(0.9, 0.4),
        prompts=model / "prompts.txt",
        fuse=True,
    )
    bundle = export_bundle(options)
    assert list(bundle.stages) == ["vae_encoder", "generator"]
    baked = np.load(bundle.root / "prompts/conditioning.npy")
    assert (baked.dtype, baked.shape[:2]) == (np.float16, (len(PROMPTS), 2))
    assert check_bundle(bundle).problems == ()
    source = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    with OneStepPipeline.load(bundle.root) as pipe:
        strong, weak = (pipe.edit(source, PROMPTS[1], strength=s).images_BHWC for s in (0.9, 0.4))
        other = pipe.edit(source, PROMPTS[2], strength=0.9).images_BHWC
    assert np.abs(strong.astype(int) - weak).max() > 0
    assert np.abs(strong.astype(int) - other).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dynamic": parse_axes("height=64:64:128"), "prompts": Path(__file__)},
            "--prompts would bake one size. Leave out --prompts, or export a bundle for each size",
        ),
        ({"height": 72}, "height 72 does not fit this model. Expected a multiple of 16"),
    ],
)
def test_what_sdxl_is_not_exported_for(
    model: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    options = ExportOptions(model=str(model), out=tmp_path / "bundle", **changes)
    with pytest.raises(HipaError, match=message):
        check_request(options)


@pytest.mark.parametrize(
    ("name", "message"), [("sdxl-turbo", None), ("sd-turbo", "sd-turbo is for SD 2.x")]
)
def test_one_step_methods_are_for_a_family(
    model: Path, tmp_path: Path, name: str, message: str | None
) -> None:
    options = ExportOptions(model=str(model), out=tmp_path / "bundle", one_step=name)
    if message is None:
        request = resolve_request(options)
        assert request.step.method is not None
        assert request.step.method.name == name
        return
    with pytest.raises(HipaError, match=message):
        check_request(options)


def test_the_size_of_a_turbo_model_is_not_the_checkpoints(model: Path, tmp_path: Path) -> None:
    """A single file of SDXL-Turbo looks like SDXL's, which makes images of 1024 pixels."""
    options = ExportOptions(model=str(model), out=tmp_path / "bundle", one_step="sdxl-turbo")
    (warning,) = resolve_request(options).warnings
    assert "sdxl-turbo makes images of 512x512 pixels, and the model says 64x64" in warning
    for chosen in ({"height": 64}, {"one_step": "dmd2-sdxl-unet"}):
        assert not resolve_request(replace(options, **chosen)).warnings


def test_a_clip_skip_is_not_that_of_the_web_uis(model: Path, tmp_path: Path) -> None:
    """Models of SDXL's family are published with the advice 'Clip skip 2', which is 0 here."""
    options = ExportOptions(model=str(model), out=tmp_path / "bundle", clip_skip=1)
    (warning,) = resolve_request(options).warnings
    assert "What the web UIs call Clip skip 2 is 0 here" in warning
    assert not resolve_request(replace(options, clip_skip=0)).warnings


def write_unet_lora(folder: Path, width: int, layer: str = "attn2_to_k") -> Path:
    """A LoRA of one projection in the UNet's middle, in kohya's layout."""
    name = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{layer}"
    path = folder / f"lora-{width}.safetensors"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, width),
        f"{name}.lora_up.weight": torch.randn(32, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "as SDXL's refiner is"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "lists no text_encoder_2"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "T5EncoderModel"]},
            "its text_encoder_2 is T5EncoderModel, expected CLIPTextModelWithProjection",
        ),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 60}, "aesthetic score"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "a pooled vector of"),
        ("unet/config.json", {"addition_embed_type": None}, "takes no pooled vector"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "Expected two widths"),
        ("unet/config.json", {"cross_attention_dim": 16}, "text contexts 16 wide"),
        ("text_encoder_2/config.json", {"projection_dim": 24}, "a pooled vector of 24"),
        (
            "vae/config.json",
            {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4},
            "has latents_mean and latents_std",
        ),
    ],
)
def test_models_that_only_look_like_sdxl(
    model: Path, tmp_path: Path, file: str, changes: dict, message: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(HipaError, match=message):
        check_request(ExportOptions(model=str(folder), out=tmp_path / "bundle"))
    with pytest.raises(HipaError, match=message):
        ModelConfig.read(folder, "generate")


def test_an_encoder_whose_weights_are_missing(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    for path in (folder / "text_encoder_2").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(HipaError, match="text_encoder_2"):
        check_request(ExportOptions(model=str(folder), out=tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("is_sdxl", "width", "message"),
    [
        (True, 768, "is a LoRA for SD 1.x: .* 768 wide. Expected one for SDXL"),
        (True, 1024, "is a LoRA for SD 2.x: .* 1024 wide. Expected one for SDXL"),
        (False, 2048, "is a LoRA for SDXL: .* 2048 wide. Expected one for SD 1.x or 2.x"),
    ],
)
def test_adaptors_of_another_family(
    model: Path, tmp_path: Path, is_sdxl: bool, width: int, message: str
) -> None:
    base = model if is_sdxl else make_model(tmp_path / "sd15")
    lora = write_unet_lora(tmp_path, width)
    options = ExportOptions(model=str(base), out=tmp_path / "bundle", adaptor=lora)
    with pytest.raises(HipaError, match=message):
        check_request(options)


@pytest.mark.thorough
@torch.no_grad()
@pytest.mark.slow
def test_images_of_several_sizes(model: Path, reference: Any, tmp_path: Path) -> None:
    """The text stage is told each size, and a prompt is remembered at each."""
    options = ExportOptions(
        model=str(model),
        out=tmp_path / "bundle",
        dtype="fp32",
        dynamic=parse_axes("height=48:64:96"),
    )
    bundle = export_bundle(options)
    names = [tensor.name for tensor in bundle.stages["text_encoder"].spec.inputs]
    assert names == ["tokens", "tokens_2", "sizes"]
    assert check_bundle(bundle).problems == ()
    wrong_size = {"original_size": (64, 64), "target_size": (64, 64)}
    with OneStepPipeline.load(bundle.root) as pipe:
        for height in (96, 48, 64, 96):
            noise = initial_noise([3], (4, height // 4, 16))
            request = {
                "prompt": MARKED,
                "num_inference_steps": 1,
                "guidance_scale": 1.0,
                "latents": torch.from_numpy(noise),
                "height": height,
                "width": 64,
                "output_type": "np",
            }
            expected = (reference(**request).images * 255).round()
            got = pipe(MARKED, seed=3, height=height).images_BHWC
            assert np.abs(expected - got).max() <= 1
        other = (reference(**request, **wrong_size).images * 255).round()
        several = pipe([MARKED, "a boat"], seed=3, height=96).images_BHWC
    assert np.abs(other - got).max() > 3
    np.testing.assert_array_equal(several[:1], got)
