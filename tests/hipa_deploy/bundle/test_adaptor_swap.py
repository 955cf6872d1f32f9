"""Adaptors to swap in, on the embedded bundle through ONNX Runtime."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import (
    FOLDER,
    MANIFEST,
    WEIGHT_MAP,
    WEIGHTS,
    AdaptorSwap,
    MappedWeight,
    WeightMap,
    read_weight_map,
    refittable_weights,
)
from hipa_deploy.bundle.folder import MANIFEST as BUNDLE_MANIFEST
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.onnx_weights import read_initializers
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from hipa_deploy.images.png import read_parameters
from tests.swap_samples import scaled_weights, write_swap

APPLE = "3d emoji of a red apple"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded bundle with adaptors 'night' and 'day', which change some weights in common."""
    bundle = Bundle.open(Path(shutil.copytree(BUNDLE, tmp_path_factory.mktemp("swap") / "bundle")))
    write_swap(bundle, bundle.root / FOLDER / "night", scaled_weights(bundle, 0.5, 5))
    write_swap(bundle, bundle.root / FOLDER / "day", scaled_weights(bundle, 1.5, 2))
    return bundle


def image(bundle: Bundle, *adaptors: str | None) -> np.ndarray:
    """One image after the swaps, one after the other."""
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        for adaptor in adaptors:
            pipe.swap_adaptor(adaptor)
        return pipe(APPLE, seed=3).images_BHWC


def test_a_swap_is_the_graph_with_these_weights(bundle: Bundle, tmp_path: Path) -> None:
    """Against the onnx package and a session of its own."""
    model, weights = onnx.load(bundle.stage_path("unet")), scaled_weights(bundle, 0.5, 5)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with np.load(bundle.path("reference/tensors.npz")) as tensors:
        feed = {"noise": tensors["noise"], "context": tensors["context"].astype(np.float16)}
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        before = pipe.runners["unet"](**feed)["latents"]
        pipe.swap_adaptor("night")
        after = pipe.runners["unet"](**feed)["latents"]
    np.testing.assert_array_equal(after, session.run(["latents"], feed)[0])
    assert np.abs(after - before).max() > 0.01


def test_back_to_the_first_exactly(bundle: Bundle) -> None:
    np.testing.assert_array_equal(image(bundle, "night", None), image(bundle))
    assert not np.array_equal(image(bundle, "night"), image(bundle))


def test_nothing_of_an_adaptor_is_left_under_the_next(bundle: Bundle) -> None:
    np.testing.assert_array_equal(image(bundle, "night", "day"), image(bundle, "day"))


def test_external_data(bundle: Bundle, tmp_path: Path) -> None:
    """Weights beside the graph, as at SD 1.5's size, are swapped like those inside it."""
    root = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    path = root / "unet/model.onnx"
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    rehash(root)
    external = Bundle.open(root)
    kinds = {weight.path.name for weight in read_initializers(path).values()}
    assert kinds == {"model.onnx", "model.onnx.data"}
    write_swap(external, root / FOLDER / "night", scaled_weights(external, 0.5, 5))
    np.testing.assert_array_equal(image(external, "night"), image(bundle, "night"))
    np.testing.assert_array_equal(image(external, "night", None), image(bundle))


def rehash(root: Path) -> None:
    manifest = json.loads((root / BUNDLE_MANIFEST).read_text())
    names = {*manifest["files"], *(p.relative_to(root).as_posix() for p in root.glob("unet/*"))}
    manifest["files"] = {name: file_sha256(root / name) for name in sorted(names)}
    (root / BUNDLE_MANIFEST).write_text(json.dumps(manifest))


def test_the_recipe_names_the_adaptor(bundle: Bundle) -> None:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        own = pipe(APPLE).parameters[0]
        pipe.swap_adaptor("night")
        swapped = pipe(APPLE).parameters[0]
        pipe.swap_adaptor(None)
        assert pipe(APPLE).parameters[0] == own
    assert {key for key in own if own[key] != swapped[key]} == {"adaptor", "unet"}
    assert swapped["adaptor"] == "1" * 64


def test_command(bundle: Bundle, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("hipa-generate")
    command = [
        script,
        bundle.root,
        APPLE,
        "--adaptor",
        "night",
        "--backend",
        "onnxruntime",
        "--out",
        "a.png",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert read_parameters(tmp_path / "a.png")["adaptor"] == "1" * 64


def test_a_folder_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_swap(bundle, tmp_path / "elsewhere", scaled_weights(bundle, 0.5, 5))
    np.testing.assert_array_equal(image(bundle, str(folder)), image(bundle, "night"))


def test_an_unknown_adaptor_and_those_there_are(bundle: Bundle) -> None:
    with pytest.raises(HipaError, match=r"no adaptor 'noon' to swap in. It has: day, night"):
        AdaptorSwap.open(bundle, "noon")
    with pytest.raises(
        HipaError, match=r"It has none. Run: hipa-export --model emoji .*--swap-for"
    ):
        AdaptorSwap.open(Bundle.open(BUNDLE), "noon")


def test_an_adaptor_of_another_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_swap(
        bundle, tmp_path / "a", scaled_weights(bundle, 2), base_files={"unet/model.onnx": "0" * 64}
    )
    with pytest.raises(HipaError, match=r"another bundle. Run: hipa-export"):
        AdaptorSwap.open(bundle, folder)


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_a_damaged_adaptor(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    folder = write_swap(bundle, tmp_path / "a", scaled_weights(bundle, 2))
    if damage == "remove":
        (folder / WEIGHTS).unlink()
    else:
        (folder / WEIGHTS).write_bytes(b"other")
    with pytest.raises(HipaError, match=rf"{WEIGHTS} is missing or corrupt"):
        AdaptorSwap.open(bundle, folder)


def test_a_manifest_of_another_version(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_swap(bundle, tmp_path / "a", scaled_weights(bundle, 2))
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(HipaError, match="not of an adaptor to swap in"):
        AdaptorSwap.open(bundle, folder)


def test_weights_of_another_graph_leave_the_pipeline_as_it_was(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder = write_swap(bundle, tmp_path / "a", {"stranger": np.zeros(3, np.float16)})
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        before = pipe(APPLE).images_BHWC
        with pytest.raises(HipaError, match="no weight stranger"):
            pipe.swap_adaptor(folder)
        np.testing.assert_array_equal(pipe(APPLE).images_BHWC, before)
        assert pipe.swapped is None


def test_weights_to_mark_refittable(tmp_path: Path) -> None:
    root = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    (root / "unet" / WEIGHT_MAP).unlink(missing_ok=True)
    plain = Bundle.open(root)
    without = plain.manifest.model_copy(
        update={
            "files": {k: v for k, v in plain.manifest.files.items() if not k.endswith(WEIGHT_MAP)}
        }
    )
    every = refittable_weights(Bundle(root, without), "unet")
    weights = read_initializers(root / "unet/model.onnx").values()
    assert set(every) == {
        w.name for w in weights if w.dtype.startswith("float") and w.read().size > 4
    }
    assert refittable_weights(Bundle(root, without), "vae_decoder") == ()

    one = MappedWeight(places=("unet.conv_in.weight",), adaptable=True)
    fixed = MappedWeight(places=("unet.conv_in.bias",))
    mapped = WeightMap(
        weights={"unet.conv_in.weight": one, "unet.conv_in.bias": fixed}, constants=()
    )
    (root / "unet" / WEIGHT_MAP).write_text(mapped.model_dump_json())
    rehash(root)
    assert refittable_weights(Bundle.open(root), "unet") == ("unet.conv_in.weight",)


def test_a_damaged_weight_map(tmp_path: Path) -> None:
    root = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    (root / "unet" / WEIGHT_MAP).write_text("[]")
    rehash(root)
    with pytest.raises(HipaError, match="not a weight map"):
        read_weight_map(Bundle.open(root), "unet")
