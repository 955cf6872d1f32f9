import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.bundle import ExportOptions, export_bundle
from hipa_deploy.export.parity import compare
from hipa_deploy.one_step import initial_noise
from tests.tiny_model import make_model

PROMPT = "a green pear"


@pytest.fixture(scope="module")
def generic_bundle(model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "generic"
    options = ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=out, dtype="fp32", layout="generic")
    return export_bundle(options)


def diffusers_image(model_dir: Path, adaptor_dir: Path, seed: int) -> np.ndarray:
    """The image as a diffusers user makes it: load_lora_weights and the shipped scheduler."""
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adaptor_dir)
    pipe.scheduler = DDIMScheduler.from_pretrained(adaptor_dir, subfolder="scheduler")
    noise = torch.from_numpy(initial_noise([seed], (4, 8, 8)))
    image = pipe(PROMPT, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="np").images[0]
    return (image * 255).round().astype(np.uint8)


def test_equals_diffusers_with_the_adaptor_loaded(model_dir: Path, adaptor_dir: Path, fp32_bundle: Bundle) -> None:
    """The chain's own promise: at least 40 dB on the same noise."""
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
    from optimum.onnxruntime import ORTDiffusionPipeline

    theirs = ORTDiffusionPipeline.from_pretrained(generic_bundle.root, provider="CPUExecutionProvider")
    theirs.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise([5], (4, 8, 8)))
    image = theirs(PROMPT, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="np").images[0]
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


def test_x0_is_computed_in_float32_inside_an_fp16_graph(model_dir: Path, tmp_path: Path) -> None:
    bundle = export_bundle(ExportOptions(model=str(model_dir), out=tmp_path / "fp16"))
    graph = onnx.shape_inference.infer_shapes(onnx.load(bundle.stage_path("unet"))).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    last = next(node for node in graph.node if node.output[0] == graph.output[0].name)
    assert types[last.output[0]] == onnx.TensorProto.FLOAT
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert {types[node.output[0]] for node in convolutions} == {onnx.TensorProto.FLOAT16}


def test_export_is_reproducible(model_dir: Path, adaptor_dir: Path, fp32_bundle: Bundle, tmp_path: Path) -> None:
    options = ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=tmp_path / "b", dtype="fp32", batch=2)
    again = export_bundle(options)
    onnx_files = {k: v for k, v in fp32_bundle.manifest.files.items() if k.endswith(".onnx")}
    assert {k: again.manifest.files[k] for k in onnx_files} == onnx_files


def test_manifest_names_its_parents(fp32_bundle: Bundle) -> None:
    manifest = fp32_bundle.manifest
    assert len(manifest.base_model.sha256) == 64
    assert manifest.adaptor is not None
    assert (manifest.adaptor.rank, manifest.adaptor.alpha) == (4, 8.0)
    assert manifest.end_to_end.psnr_db >= 60
    assert "hipa.json" not in manifest.files
    assert {"reference/tensors.npz", "tokenizer/tokenizer.json"} <= manifest.files.keys()


def test_another_size(model_dir: Path, tmp_path: Path) -> None:
    export_bundle(ExportOptions(model=str(model_dir), out=tmp_path / "b", dtype="fp32", height=48, width=32))
    with OneStepPipeline.load(tmp_path / "b", "onnxruntime") as pipe:
        assert pipe(PROMPT).images_BHWC.shape == (1, 48, 32, 3)


def test_v_prediction(tmp_path: Path) -> None:
    model = make_model(tmp_path / "v", "v_prediction")
    bundle = export_bundle(ExportOptions(model=str(model), out=tmp_path / "b", dtype="fp32"))
    assert bundle.manifest.one_step.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 10**9}, "batch"),
        ({"height": 31}, "multiple"),
        ({"adaptor": Path("/no/such")}, "does not exist"),
        ({"model": "/no/such"}, "does not exist"),
    ],
)
def test_bad_input_leaves_nothing(model_dir: Path, tmp_path: Path, changes: dict, message: str) -> None:
    options = {"model": str(model_dir), "out": tmp_path / "out"} | changes
    with pytest.raises(HipaError, match=message):
        export_bundle(ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_an_adaptor_of_another_model_leaves_nothing(adaptor_dir: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=7)
    with pytest.raises(HipaError, match="another base model"):
        export_bundle(ExportOptions(model=str(other), adaptor=adaptor_dir, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adaptor_of_another_tool_is_taken(model_dir: Path, adaptor_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adaptor_dir, tmp_path / "plain")
    (tmp_path / "plain" / "hipa_adaptor.json").unlink()
    options = ExportOptions(model=str(model_dir), adaptor=tmp_path / "plain", out=tmp_path / "out", dtype="fp32")
    assert export_bundle(options).manifest.one_step.timestep == 999


def test_a_folder_in_use_is_not_touched(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(HipaError, match="not empty"):
        export_bundle(ExportOptions(model=str(model_dir), out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_overflow_in_fp16_fails_the_export(model_dir: Path, tmp_path: Path) -> None:
    """A planted overflow: weights that are fine in FP32 and infinite in FP16."""
    shutil.copytree(model_dir, tmp_path / "hot")
    path = tmp_path / "hot/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.weight"] *= 1e7
    save_file(weights, path)
    with pytest.raises(HipaError, match="vae_decoder in fp16"):
        export_bundle(ExportOptions(model=str(tmp_path / "hot"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_generic_layout_has_what_diffusers_reads(generic_bundle: Bundle) -> None:
    index = json.loads((generic_bundle.root / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    scheduler = json.loads((generic_bundle.root / "scheduler/scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing"
    assert scheduler["set_alpha_to_one"] is True
