"""Bundles of the tasks with a source image, against diffusers' parts and the formulas."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from transformers import CLIPTextModel, CLIPTokenizer

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.engines.latency.measure import profile_pipeline
from hipa_deploy.engines.tensorrt.sequence_spec import sequence_spec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.open_stages import open_runner
from hipa_deploy.generate.swap_stage import _check_output, _expected_output
from hipa_deploy.images.compositing import composite, hide_hole, latent_mask
from hipa_deploy.images.example_source import example_image, example_mask
from hipa_deploy.images.png import enlarge, png_bytes, read_parameters
from hipa_deploy.images.source import edit_source
from tests.stages_as_one import StagesAsOne
from tests.tiny_model import make_model

PROMPT = "a green pear"
SEED = 5
IMAGE_HWC = example_image(32, 32, number=3)
MASK_HW = example_mask(32, 32)
STRENGTHS = (0.75, 0.5)


class Parts:
    """The model as diffusers loads it, and one step by the formulas of the task, written out."""

    def __init__(self, model_dir: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae")
        self.text_encoder = CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(model_dir, subfolder="tokenizer")
        self.alpha_bar = DDPMScheduler.from_pretrained(
            model_dir, subfolder="scheduler"
        ).alphas_cumprod
        self.noise = torch.from_numpy(initial_noise([SEED], (4, 8, 8)))

    def encode(self, image_HWC: np.ndarray) -> torch.Tensor:
        sample = torch.from_numpy(image_HWC.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        return self.vae.encode(sample).latent_dist.mean * self.vae.config.scaling_factor

    def x0(self, z: torch.Tensor, timestep: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.tokenizer(
            [PROMPT], padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        context = self.text_encoder(tokens).last_hidden_state
        eps = self.unet(z if seen is None else seen, timestep, context).sample
        a = self.alpha_bar[timestep]
        return (z - (1 - a).sqrt() * eps) / a.sqrt()

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        image = (
            self.vae.decode(latents / self.vae.config.scaling_factor).sample[0].permute(1, 2, 0) / 2
            + 0.5
        )
        return (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    def edit(self, image_HWC: np.ndarray, timestep: int) -> np.ndarray:
        return self.edit_latents(self.encode(image_HWC), timestep)

    def edit_latents(self, source: torch.Tensor, timestep: int) -> np.ndarray:
        a = self.alpha_bar[timestep]
        return self.decode(self.x0(a.sqrt() * source + (1 - a).sqrt() * self.noise, timestep))


@pytest.fixture(scope="module")
def parts(model_dir: Path):
    with torch.no_grad():
        yield Parts(model_dir)


def export(model_dir: Path, out: Path, **options) -> Bundle:
    return export_bundle(ExportOptions(model=str(model_dir), out=out, dtype="fp32", **options))


@pytest.fixture(scope="module")
def edit_bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(
        model_dir, tmp_path_factory.mktemp("edit") / "b", task="edit", strengths=(0.5, 0.75)
    )


@pytest.fixture(scope="module")
def tiny_vae(tiny_vae_dir: Path) -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(tiny_vae_dir)


@pytest.fixture(scope="module")
def tiny_bundle(
    model_dir: Path,
    tiny_vae_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """Of the strength that an edit has when none is given, with a tiny encoder."""
    out = tmp_path_factory.mktemp("single") / "b"
    return export(model_dir, out, task="edit", encoder=tiny_vae_dir)


@pytest.fixture(scope="module")
def inpaint_bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(model_dir, tmp_path_factory.mktemp("inpaint") / "b", task="inpaint")


@pytest.fixture(scope="module")
def upscale_bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(model_dir, tmp_path_factory.mktemp("upscale") / "b", task="upscale", batch=2)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the last level of rounding."""
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_the_encoder_gives_the_scaled_mean(edit_bundle: Bundle, parts: Parts) -> None:
    with open_runner(edit_bundle, "vae_encoder", "onnxruntime") as runner:
        source = runner(image=IMAGE_HWC[None])["source"]
    np.testing.assert_allclose(source, parts.encode(IMAGE_HWC).numpy(), atol=1e-5)


@pytest.mark.parametrize(("strength", "timestep"), [(0.75, 749), (0.5, 499), (None, 749)])
def test_an_edit_at_each_strength(
    edit_bundle: Bundle, parts: Parts, strength: float | None, timestep: int
) -> None:
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        result = pipe.edit(IMAGE_HWC, PROMPT, strength=strength, seed=SEED)
    assert_close(result.images_BHWC[0], parts.edit(IMAGE_HWC, timestep))
    assert result.parameters[0]["strength"] == (strength or 0.75)


def test_the_edits_manifest(edit_bundle: Bundle, parts: Parts) -> None:
    manifest = edit_bundle.manifest
    assert list(edit_bundle.stages) == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]
    assert [tensor.name for tensor in edit_bundle.stages["unet"].spec.inputs] == [
        "noise",
        "source",
        "step",
        "context",
    ]
    assert (manifest.task, manifest.upscale, manifest.one_step.timestep) == ("edit", None, 749)
    assert [(entry.strength, entry.timestep) for entry in manifest.strengths] == [
        (0.75, 749),
        (0.5, 499),
    ]
    assert [entry.alpha_bar for entry in manifest.strengths] == [
        float(parts.alpha_bar[t]) for t in (749, 499)
    ]
    assert manifest.encoder is not None
    assert manifest.decoder is not None
    assert (manifest.encoder.kind, manifest.encoder.sha256) == ("full", manifest.decoder.sha256)
    assert all(stage.cost and stage.cost.activation_bytes for stage in manifest.stages)


@pytest.mark.thorough
def test_one_strength_is_folded_and_gives_the_same(
    tiny_bundle: Bundle, tiny_vae: AutoencoderTiny, parts: Parts
) -> None:
    assert [tensor.name for tensor in tiny_bundle.stages["unet"].spec.inputs] == [
        "noise",
        "source",
        "context",
    ]
    assert [entry.strength for entry in tiny_bundle.manifest.strengths] == [0.5]
    with OneStepPipeline.load(tiny_bundle.root, "onnxruntime") as pipe:
        result = pipe.edit(IMAGE_HWC, PROMPT, seed=SEED)
    expected = parts.edit_latents(tiny_encoding(tiny_vae), 499)
    assert_close(result.images_BHWC[0], expected)


def tiny_encoding(tiny: AutoencoderTiny) -> torch.Tensor:
    """The latents of ``IMAGE_HWC``, as diffusers gives them."""
    sample = torch.from_numpy(IMAGE_HWC.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        return tiny.encode(sample).latents


@pytest.mark.thorough
def test_several_strengths_fused_in_fp16_with_dynamic_sizes(
    model_dir: Path, tmp_path: Path, parts: Parts
) -> None:
    axes = parse_axes("batch=1:1:2,height=32:32:64,width=32:48:64")
    options = ExportOptions(
        model=str(model_dir),
        out=tmp_path / "b",
        fuse=True,
        dynamic=axes,
        task="edit",
        strengths=STRENGTHS,
    )
    bundle = export_bundle(options)
    assert bundle.stages["vae_encoder"].spec.inputs[0].shape == ("batch", "height", "width", 3)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        edited = pipe.edit(
            IMAGE_HWC, PROMPT, strength=0.5, seed=SEED - 1, count=3, height=32, width=32
        )
        assert pipe.edit(IMAGE_HWC, PROMPT).images_BHWC.shape == (1, 32, 48, 3)
    error = np.abs(edited.images_BHWC[1].astype(float) - parts.edit(IMAGE_HWC, 499))
    assert error.mean() < 1
    assert check_bundle(bundle, "onnxruntime").problems == ()


def test_where_the_step_starts_and_ends_is_float32_in_an_fp16_graph(
    model_dir: Path, tiny_vae_dir: Path, tmp_path: Path
) -> None:
    # The UNet alone is looked at: the other stages are the smallest that there are.
    options = ExportOptions(
        model=str(model_dir),
        out=tmp_path / "b",
        task="edit",
        strengths=STRENGTHS,
        encoder=tiny_vae_dir,
        decoder=tiny_vae_dir,
        prompts=model_dir / "prompts.txt",
    )
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(export_bundle(options).stage_path("unet"))
    ).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)
    }
    produced = {output: node for node in graph.node for output in node.output}
    last = produced[graph.output[0].name]
    assert {types[name] for name in (*last.input, *last.output) if name in types} == {
        onnx.TensorProto.FLOAT
    }
    first = next(node for node in graph.node if node.op_type == "Conv")
    cast = produced[first.input[0]]
    assert cast.op_type == "Cast"
    assert types[cast.input[0]] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("in_channels", [4, pytest.param(9, marks=pytest.mark.thorough)])
def test_inpainting_equals_the_formulas(
    in_channels: int, inpaint_bundle: Bundle, model_dir: Path, parts: Parts, tmp_path: Path
) -> None:
    bundle = inpaint_bundle
    if in_channels == 9:
        model_dir = make_model(tmp_path / "tiny", in_channels=9)
        bundle = export(model_dir, tmp_path / "b", task="inpaint")
        parts = Parts(model_dir)
    assert bundle.manifest.one_step.latent_shape == (4, 8, 8)
    mask = torch.from_numpy(latent_mask(MASK_HW, 4))[None]
    source = parts.encode(hide_hole(IMAGE_HWC, MASK_HW))
    z = parts.noise if in_channels == 9 else mask * parts.noise + (1 - mask) * source
    seen = torch.cat([z, mask, source], dim=1) if in_channels == 9 else None
    made = parts.decode(mask * parts.x0(z, 999, seen) + (1 - mask) * source)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        result = pipe.inpaint(IMAGE_HWC, MASK_HW, PROMPT, seed=SEED, feather=0, match=False)
        matched = pipe.inpaint(IMAGE_HWC, MASK_HW, PROMPT, seed=SEED, feather=0)
    expected = np.where(MASK_HW[..., None] > 0, made, IMAGE_HWC)
    assert_close(result.images_BHWC[0], expected)
    assert (result.parameters[0]["match"], matched.parameters[0]["match"]) == (False, True)
    # By default its colours are shifted to meet those around the mask.
    shifted = composite(made, IMAGE_HWC, MASK_HW, 0, match=True)
    assert_close(matched.images_BHWC[0], shifted)
    assert not np.array_equal(shifted, expected)


def test_inpainting_keeps_the_sources_latents_and_pixels(
    inpaint_bundle: Bundle, parts: Parts
) -> None:
    mask_1hw = latent_mask(MASK_HW, 4)
    source = parts.encode(IMAGE_HWC).numpy()
    context = np.random.default_rng(0).normal(size=(1, 77, 16)).astype(np.float32)
    with OneStepPipeline.load(inpaint_bundle.root, "onnxruntime") as pipe:
        feed = {
            "noise": parts.noise.numpy(),
            "source": source,
            "mask": mask_1hw[None],
            "context": context,
        }
        latents = pipe.runners["unet"](**feed)["latents"]
        image = pipe.inpaint(IMAGE_HWC, MASK_HW, PROMPT, feather=2).images_BHWC[0]
    kept = np.broadcast_to(mask_1hw[None] == 0, latents.shape)
    np.testing.assert_array_equal(latents[kept], source[kept])
    assert not np.isclose(latents[~kept], source[~kept]).all()
    # The mask begins at column 16, and the seam reaches to column 14.
    np.testing.assert_array_equal(image[:, :13], IMAGE_HWC[:, :13])
    assert not np.array_equal(image[8:24, 16:28], IMAGE_HWC[8:24, 16:28])


def test_an_image_of_one_tile_is_not_cut(upscale_bundle: Bundle, parts: Parts) -> None:
    small_HWC = example_image(8, 8)
    latents = parts.x0(parts.encode(enlarge(small_HWC, 4)), 999)
    with OneStepPipeline.load(upscale_bundle.root, "onnxruntime") as pipe:
        result = pipe.upscale(small_HWC, PROMPT)
        part = pipe.upscale(small_HWC[:5, :7], PROMPT)
    assert upscale_bundle.manifest.upscale == 4
    assert [tensor.name for tensor in upscale_bundle.stages["unet"].spec.inputs] == [
        "source",
        "context",
    ]
    assert_close(result.images_BHWC[0], parts.decode(latents))
    assert part.images_BHWC.shape == (1, 20, 28, 3)


def test_a_large_image_is_made_of_tiles(upscale_bundle: Bundle) -> None:
    small_HWC = example_image(16, 8)
    seen: list[str] = []
    with OneStepPipeline.load(upscale_bundle.root, "onnxruntime") as pipe:
        result = pipe.upscale(small_HWC, PROMPT, overlap=16)
        pipe.upscale(small_HWC, PROMPT, overlap=16, timer=lambda stage: _Noted(seen, stage))
        top = pipe.upscale(small_HWC[:9], PROMPT, overlap=0)
    assert result.images_BHWC.shape == (1, 64, 32, 3)
    assert seen == ["vae_encoder", "unet", "vae_decoder"] * 2  # three tiles in batches of two
    assert top.images_BHWC.shape == (1, 36, 32, 3)
    assert result.parameters[0]["overlap"] == 16


class _Noted:
    """A timer that notes which stages it was asked to time."""

    def __init__(self, seen: list[str], stage: str) -> None:
        seen.append(stage)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("task", ["edit", "inpaint", "upscale"])
def test_the_self_check_passes(task: str, request: pytest.FixtureRequest) -> None:
    found = check_bundle(request.getfixturevalue(f"{task}_bundle"), "onnxruntime")
    assert found.problems == ()
    assert list(found.stages) == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]


def test_one_encoding_serves_several_seeds(edit_bundle: Bundle) -> None:
    seen: list[str] = []
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        for image_HWC in (IMAGE_HWC, IMAGE_HWC, IMAGE_HWC[:, ::-1]):
            pipe.edit(image_HWC, PROMPT, count=2, timer=lambda stage: _Noted(seen, stage))
    assert seen.count("vae_encoder") == 2
    assert seen.count("unet") == 6


def test_a_tiny_encoder(tiny_bundle: Bundle, tiny_vae: AutoencoderTiny) -> None:
    encoder = tiny_bundle.manifest.encoder
    assert encoder is not None
    assert (encoder.kind, encoder.name) == ("tiny", "tiny")
    with open_runner(tiny_bundle, "vae_encoder", "onnxruntime") as runner:
        source = runner(image=IMAGE_HWC[None])["source"]
    np.testing.assert_allclose(source, tiny_encoding(tiny_vae).numpy(), atol=1e-5)


def test_a_pil_image_of_another_size_is_cropped_and_scaled(edit_bundle: Bundle) -> None:
    wide = Image.fromarray(example_image(64, 96)).convert("RGBA")
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        whole, middle = (pipe.edit(image, PROMPT) for image in (wide, wide.crop((16, 0, 80, 64))))
    # Not equal, as Lanczos sees beyond the crop.
    assert np.abs(whole.images_BHWC.astype(int) - middle.images_BHWC).mean() < 1
    assert whole.parameters[0]["source"] != middle.parameters[0]["source"]


def test_bad_requests_are_said_in_one_line(
    edit_bundle: Bundle, inpaint_bundle: Bundle, upscale_bundle: Bundle
) -> None:
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        for strength, message in (
            (0.0, "out of range"),
            (1.5, "out of range"),
            (0.6, "is not one of this bundle's: 0.75"),
        ):
            with pytest.raises(HipaError, match=message):
                pipe.edit(IMAGE_HWC, PROMPT, strength=strength)
        with pytest.raises(
            HipaError,
            match=r"to edit, not to generate. Use hipa-edit, or pipe.edit\(image, prompt\)",
        ):
            pipe(PROMPT)
        with pytest.raises(HipaError, match="to edit, not to inpaint"):
            pipe.inpaint(IMAGE_HWC, MASK_HW, PROMPT)
        with pytest.raises(HipaError, match="smaller than one latent"):
            pipe.edit(IMAGE_HWC[:3], PROMPT)
        with pytest.raises(HipaError, match="height 40 is not a size of this bundle"):
            pipe.edit(IMAGE_HWC, PROMPT, height=40)
    with OneStepPipeline.load(inpaint_bundle.root, "onnxruntime") as pipe:
        for mask, feather, message in (
            (MASK_HW[:16], 0, "mask is 16x32 pixels"),
            (MASK_HW * 0, 0, "mask is empty"),
            (MASK_HW * 0 + 1, 0, "mask is full"),
            (MASK_HW, -1, "feather is -1"),
        ):
            with pytest.raises(HipaError, match=message):
                pipe.inpaint(IMAGE_HWC, mask, PROMPT, feather=feather)
        wide_HWC = example_image(32, 96)
        edge_HW = np.zeros((32, 96))
        edge_HW[:, :8] = 1
        with pytest.raises(HipaError, match="outside the centre crop"):
            pipe.inpaint(wide_HWC, edge_HW, PROMPT)
    with OneStepPipeline.load(upscale_bundle.root, "onnxruntime") as pipe:
        with pytest.raises(HipaError, match="overlap is 32"):
            pipe.upscale(IMAGE_HWC, overlap=32)
        with pytest.raises(HipaError, match="pixels are too many"):
            pipe.upscale(np.zeros((5000, 5000), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": (0.5,)}, "--strengths is for the task edit, this is generate"),
        ({"encoder": Path("tiny")}, "--encoder is for tasks with a source image"),
        (
            {"task": "inpaint", "layout": "generic"},
            "--layout generic is for the task generate, this is inpaint",
        ),
        ({"task": "edit", "strengths": (1.2,)}, "strength 1.2 is out of range"),
        ({"task": "edit", "strengths": (0.5, 0.5004)}, "start at the same timestep, 499"),
        ({"task": "edit", "encoder": Path("/no/such")}, "encoder /no/such does not exist"),
    ],
)
def test_options_that_contradict_leave_nothing(
    model_dir: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(HipaError, match=message):
        export_bundle(replace(ExportOptions(model=str(model_dir), out=tmp_path / "out"), **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_chain_starts_at_the_image_and_leaves_out_what_is_known(edit_bundle: Bundle) -> None:
    """The chain that TensorRT runs, on ONNX Runtime: stages composed by their tensors' names."""
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        stages = StagesAsOne(pipe.runners)
        chained = OneStepPipeline(edit_bundle, "tensorrt", stages)
        expected = pipe.edit(IMAGE_HWC, PROMPT, strength=0.5, seed=SEED).images_BHWC
        for _ in range(2):
            made = chained.edit(IMAGE_HWC, PROMPT, strength=0.5, seed=SEED).images_BHWC
            np.testing.assert_array_equal(made, expected)
        source = edit_source(edit_bundle, 255 - IMAGE_HWC, height=None, width=None)
        on_device = chained.generate_on_device(PROMPT, source=source, seed=SEED)
        np.testing.assert_array_equal(on_device, pipe(PROMPT, source=source, seed=SEED).images_BHWC)
    assert stages.log == [
        (["image", "noise", "step", "tokens"], ("images", "latents", "context", "source")),
        (["context", "noise", "source", "step"], ("images", "latents")),
        (["context", "image", "noise", "step"], ("images",)),
    ]


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        ("edit", ["tokens", "image", "noise", "step"]),
        ("inpaint", ["tokens", "image", "noise", "mask"]),
        ("upscale", ["tokens", "image"]),
    ],
)
def test_what_an_engine_chain_takes(
    task: str, inputs: list[str], request: pytest.FixtureRequest
) -> None:
    whole = sequence_spec(
        [stage.spec for stage in request.getfixturevalue(f"{task}_bundle").manifest.stages]
    )
    assert [tensor.name for tensor in whole.inputs] == inputs
    assert [tensor.name for tensor in whole.outputs] == ["images"]


def test_the_reference_of_a_refit(edit_bundle: Bundle) -> None:
    """What a refitted engine is checked by, here with ONNX Runtime in its place."""
    with open_runner(edit_bundle, "unet", "onnxruntime") as runner:
        feed, expected = _expected_output(edit_bundle, runner, None)
        _check_output(runner, feed, expected, edit_bundle.manifest.precision)


def test_a_profile_times_the_encoder_in_every_run(edit_bundle: Bundle) -> None:
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        report = profile_pipeline(
            pipe, runs=3, warmup=0, layers=True, console=Console(file=io.StringIO())
        )
    assert list(report.stages) == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]
    assert {stage.runs for stage in report.stages.values()} == {3}
    assert report.layers["vae_encoder"]


def test_the_commands(
    edit_bundle: Bundle,
    inpaint_bundle: Bundle,
    upscale_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files in, PNG with their generation parameters out; the same bytes as from Python."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE_HWC).save("image.tiff")
    Image.fromarray((MASK_HW * 255).astype(np.uint8)).save("mask.png")
    backend = ["--backend", "onnxruntime"]
    run(
        "edit",
        edit_bundle,
        "image.tiff",
        PROMPT,
        "--strength",
        "0.5",
        "--count",
        "2",
        "--out",
        "edited",
        *backend,
    )
    run(
        "inpaint",
        inpaint_bundle,
        "image.tiff",
        "mask.png",
        PROMPT,
        "--feather",
        "2",
        "--out",
        "in.png",
        *backend,
    )
    run("upscale", upscale_bundle, "image.tiff", "--out", "large.png", *backend)
    assert sorted(path.name for path in Path("edited").iterdir()) == [
        "000-seed0.png",
        "000-seed1.png",
    ]
    with OneStepPipeline.load(edit_bundle.root, "onnxruntime") as pipe:
        made = pipe.edit(IMAGE_HWC, PROMPT, strength=0.5, seed=1)
    assert Path("edited/000-seed1.png").read_bytes() == png_bytes(
        made.images_BHWC[0], made.parameters[0]
    )
    parameters = read_parameters(Path("in.png"))
    assert (parameters["task"], parameters["feather"], parameters["source"]) == (
        "inpaint",
        2,
        made.parameters[0]["source"],
    )
    assert Image.open("large.png").size == (128, 128)
    assert read_parameters(Path("large.png"))["upscale"] == 4


def run(verb: str, bundle: Bundle, *arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, str(bundle.root), *arguments])
    assert stopped.value.code == 0
