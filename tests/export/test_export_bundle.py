import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.parity import compare
from hipa_deploy.embedded import EXAMPLE_PROMPT, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import example_prompt, export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.generate.noise import initial_noise
from tests.keys import write_private, write_public
from tests.tiny_model import make_model

PROMPT = "a green pear"


@pytest.fixture(scope="module")
def generic_bundle(
    model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "generic"
    options = ExportOptions(
        model=str(model_dir), adaptor=adaptor_dir, out=out, dtype="fp32", layout="generic"
    )
    return export_bundle(options)


@pytest.fixture(scope="module")
def plain_fp16_bundle(
    model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """In FP16, with an adaptor that has no file of this project's own: another tool's."""
    folder = tmp_path_factory.mktemp("plain")
    adaptor = Path(shutil.copytree(adaptor_dir, folder / "adaptor"))
    (adaptor / "hipa_adaptor.json").unlink()
    return export_bundle(ExportOptions(model=str(model_dir), adaptor=adaptor, out=folder / "b"))


KEY = ed25519.Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def signed_bundle(
    model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """``fp32_bundle`` once more, and signed."""
    folder = tmp_path_factory.mktemp("signed")
    private = write_private(folder / "private.pem", KEY)
    return export_bundle(
        ExportOptions(
            model=str(model_dir),
            adaptor=adaptor_dir,
            out=folder / "b",
            dtype="fp32",
            batch=2,
            signing_key=private,
        )
    )


def diffusers_image(
    model_dir: Path,
    adaptor_dir: Path,
    seed: int,
    size: tuple[int, int] = (32, 32),
    decoder: Path | None = None,
) -> np.ndarray:
    """The image as a diffusers user makes it: load_lora_weights and the shipped scheduler."""
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    if decoder:
        pipe.vae = AutoencoderTiny.from_pretrained(decoder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adaptor_dir)
    pipe.scheduler = DDIMScheduler.from_pretrained(adaptor_dir, subfolder="scheduler")
    height, width = size
    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    noise = torch.from_numpy(initial_noise([seed], (4, height // 4, width // 4)))
    image = pipe(PROMPT, height=height, width=width, latents=noise, **options).images[0]
    return (image * 255).round().astype(np.uint8)


def test_equals_diffusers_with_the_adaptor_loaded(
    model_dir: Path, adaptor_dir: Path, fp32_bundle: Bundle
) -> None:
    """The promise of every export: at least 40 dB on the same noise."""
    with OneStepPipeline.load(fp32_bundle.root, "onnxruntime") as pipe:
        ours = pipe(PROMPT, seed=5).images_BHWC[0]
    assert compare(ours, diffusers_image(model_dir, adaptor_dir, 5)).psnr_db >= 40


def test_generic_layout_gives_the_same_image(fp32_bundle: Bundle, generic_bundle: Bundle) -> None:
    images = []
    for bundle in (fp32_bundle, generic_bundle):
        with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
            images.append(pipe(PROMPT, seed=5).images_BHWC)
    assert compare(images[1], images[0]).psnr_db >= 40


def test_generic_layout_runs_in_optimum(generic_bundle: Bundle) -> None:
    pytest.importorskip("optimum.onnxruntime")
    from optimum.onnxruntime import ORTDiffusionPipeline

    theirs = ORTDiffusionPipeline.from_pretrained(
        generic_bundle.root, provider="CPUExecutionProvider"
    )
    theirs.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise([5], (4, 8, 8)))
    image = theirs(
        PROMPT, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="np"
    ).images[0]
    with OneStepPipeline.load(generic_bundle.root, "onnxruntime") as pipe:
        ours = pipe(PROMPT, seed=5).images_BHWC[0]
    assert compare((image * 255).round().astype(np.uint8), ours).psnr_db >= 40


def test_graphs_are_valid_and_specialised(fp32_bundle: Bundle) -> None:
    for name, stage in fp32_bundle.stages.items():
        onnx.checker.check_model(fp32_bundle.stage_path(name), full_check=True)
        model = onnx.load(fp32_bundle.stage_path(name))
        assert [i.name for i in model.graph.input] == [t.name for t in stage.spec.inputs]
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    unet = onnx.load(fp32_bundle.stage_path("unet"))
    assert not [i.name for i in unet.graph.initializer if "time" in i.name]


def test_x0_is_computed_in_float32_inside_an_fp16_graph(plain_fp16_bundle: Bundle) -> None:
    path = plain_fp16_bundle.stage_path("unet")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    last = next(node for node in graph.node if node.output[0] == graph.output[0].name)
    assert types[last.output[0]] == onnx.TensorProto.FLOAT
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert {types[node.output[0]] for node in convolutions} == {onnx.TensorProto.FLOAT16}


def test_export_is_reproducible(fp32_bundle: Bundle, signed_bundle: Bundle) -> None:
    again = signed_bundle.manifest.files
    onnx_files = {k: v for k, v in fp32_bundle.manifest.files.items() if k.endswith(".onnx")}
    assert {k: again[k] for k in onnx_files} == onnx_files


def test_manifest_names_its_parents(fp32_bundle: Bundle) -> None:
    manifest = fp32_bundle.manifest
    assert re.fullmatch("tensors-v1:[0-9a-f]{64}", manifest.base_model.sha256)
    assert manifest.adaptor is not None
    assert (manifest.adaptor.rank, manifest.adaptor.alpha) == (4, 8.0)
    assert manifest.end_to_end.psnr_db >= 60
    assert "hipa.json" not in manifest.files
    assert {"reference/tensors.npz", "tokenizer/tokenizer.json"} <= manifest.files.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 10**9}, "batch"),
        ({"height": 31}, "multiple"),
        ({"adaptor": Path("/no/such")}, "does not exist"),
        ({"model": "/no/such"}, "does not exist"),
        ({"layout": "generic", "fuse": True}, "--fuse needs --layout onestep"),
        ({"prompts": Path("/no/such")}, "cannot be read"),
    ],
)
def test_bad_input_leaves_nothing(
    model_dir: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    options = {"model": str(model_dir), "out": tmp_path / "out"} | changes
    with pytest.raises(HipaError, match=message):
        export_bundle(ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_an_adaptor_of_another_model_leaves_nothing(adaptor_dir: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=7)
    with pytest.raises(HipaError, match="another base model"):
        export_bundle(ExportOptions(model=str(other), adaptor=adaptor_dir, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adaptor_of_another_tool_is_taken(plain_fp16_bundle: Bundle) -> None:
    manifest = plain_fp16_bundle.manifest
    assert manifest.adaptor is not None
    assert manifest.one_step.timestep == 999


def test_a_folder_in_use_is_not_touched(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(HipaError, match="not empty"):
        export_bundle(ExportOptions(model=str(model_dir), out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_overflow_in_fp16_becomes_fp32_islands(model_dir: Path, tmp_path: Path) -> None:
    """Scores of one attention, and the decoder's residual stream, are infinite in FP16."""
    hot = Path(shutil.copytree(model_dir, tmp_path / "hot"))
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    scale_weights(hot / "unet", {f"{attention}.to_q.weight": 3e3, f"{attention}.to_k.weight": 3e3})
    scale_weights(hot / "vae", {"decoder.conv_in.weight": 1e7})
    bundle = export_bundle(ExportOptions(model=str(hot), out=tmp_path / "out"))
    assert bundle.stages["text_encoder"].fp32_islands == ()
    assert bundle.stages["unet"].fp32_islands == (f"unet.{attention}",)
    assert "decoder.conv_in" in bundle.stages["vae_decoder"].fp32_islands
    assert bundle.manifest.end_to_end.psnr_db >= 35
    weights = onnx.load(bundle.stage_path("unet")).graph.initializer
    assert {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16} <= {
        weight.data_type for weight in weights
    }


def scale_weights(folder: Path, factors: dict[str, float]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name, factor in factors.items():
        weights[name] *= factor
    save_file(weights, path)


def test_a_full_disk_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    """No file of this process may grow past 100 kB, as if the disk were full there."""
    code = (
        "import resource, sys; from hipa_deploy.commands.app import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); main(sys.argv[1:])"
    )
    arguments = ["export", "--model", str(model_dir), "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "File too large" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small_bundle(
    model_dir: Path, adaptor_dir: Path, tiny_vae_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The smallest thing a device can run: one graph, a tiny decoder, a closed set of prompts."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "prompts.txt").write_text(f"a red apple\n{PROMPT}\n")
    options = ExportOptions(
        model=str(model_dir), adaptor=adaptor_dir, out=folder / "small", dtype="fp32", fuse=True,
        decoder=tiny_vae_dir, prompts=folder / "prompts.txt", height=48, width=32,
    )  # fmt: skip
    return export_bundle(options)


def test_fused_tiny_and_baked_equals_diffusers(
    model_dir: Path, adaptor_dir: Path, tiny_vae_dir: Path, small_bundle: Bundle
) -> None:
    assert tuple(small_bundle.stages) == ("generator",)
    assert not [
        name for name in small_bundle.manifest.files if "token" in name or "text_encoder" in name
    ]
    assert small_bundle.manifest.decoder is not None
    assert small_bundle.manifest.decoder.kind == "tiny"
    theirs = diffusers_image(model_dir, adaptor_dir, 5, size=(48, 32), decoder=tiny_vae_dir)
    with OneStepPipeline.load(small_bundle.root, "onnxruntime") as pipe:
        ours = pipe(PROMPT, seed=5).images_BHWC[0]
    assert ours.shape == (48, 32, 3)
    assert compare(ours, theirs).psnr_db >= 40


def test_sizes_and_batches_of_a_dynamic_bundle(
    model_dir: Path, adaptor_dir: Path, tmp_path: Path
) -> None:
    axes = parse_axes("batch=1:1:3,height=32:32:64,width=32:48:64")
    options = ExportOptions(
        model=str(model_dir),
        adaptor=adaptor_dir,
        out=tmp_path / "b",
        dtype="fp32",
        fuse=True,
        dynamic=axes,
    )
    generator = export_bundle(options).stages["generator"]
    assert generator.spec.inputs[0].shape == ("batch", 4, "latent_height", "latent_width")
    assert generator.cost is not None
    with OneStepPipeline.load(tmp_path / "b", "onnxruntime") as pipe:
        for size in ((32, 48), (64, 32)):
            ours = pipe(PROMPT, seed=5, height=size[0], width=size[1]).images_BHWC[0]
            assert (
                compare(ours, diffusers_image(model_dir, adaptor_dir, 5, size=size)).psnr_db >= 40
            )
        together = pipe(PROMPT, seed=3, count=4)  # a batch of three and a batch of one
        assert together.images_BHWC.shape == (4, 32, 48, 3)
        assert compare(together.images_BHWC[2], pipe(PROMPT, seed=5).images_BHWC[0]).psnr_db >= 60
        with pytest.raises(
            HipaError,
            match=r"height 36 is not a size of this bundle. Expected 32 to 64 in steps of 8",
        ):
            pipe(PROMPT, height=36)


def test_a_prompt_that_was_not_baked(small_bundle: Bundle) -> None:
    with (
        OneStepPipeline.load(small_bundle.root, "onnxruntime") as pipe,
        pytest.raises(HipaError, match="nearest"),
    ):
        pipe("a blue apple")


def test_generic_layout_has_what_diffusers_reads(generic_bundle: Bundle) -> None:
    index = json.loads((generic_bundle.root / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    scheduler = json.loads((generic_bundle.root / "scheduler/scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing"
    assert scheduler["set_alpha_to_one"] is True


def test_the_prompt_of_the_reference_is_the_models(
    fp32_bundle: Bundle, small_bundle: Bundle
) -> None:
    assert example_prompt(ModelParts.open("emoji")) == EXAMPLE_PROMPT
    assert example_prompt(ModelParts.open(str(MODEL))) == EXAMPLE_PROMPT
    for bundle, prompt in ((fp32_bundle, "a photo of a red apple"), (small_bundle, "a red apple")):
        written = json.loads((bundle.root / "reference/prompts.json").read_text())
        assert written["prompts"] == [prompt]


def test_a_signed_export_is_signed_and_a_bad_key_is_found_at_once(
    model_dir: Path, signed_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(model=str(model_dir), out=tmp_path / "b", dtype="fp32")
    with pytest.raises(HipaError, match=r"private key .*private.pem cannot be read"):
        export_bundle(replace(options, signing_key=tmp_path / "private.pem"))
    assert not (tmp_path / "b").exists()
    monkeypatch.setenv("HIPA_PUBLIC_KEY", str(write_public(tmp_path / "public.pem", KEY)))
    Bundle.open(signed_bundle.root).verify()
