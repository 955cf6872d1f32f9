"""Every form in which models lie on disks, of every model as published: one identity, one bundle.

The models have the published configurations and tiny sizes. A single file of a tiny model needs
``--config FOLDER``, as any file does whose weights do not show what it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.models.locate import model_folder
from hipa_deploy.models.single_file import PARTS as PREFIXES
from hipa_deploy.models.single_file import TEXT
from hipa_deploy.models.weights.weight_identity import weights_identity
from tests.original_layout import write_checkpoint
from tests.packaging import as_bin, as_fp16_variant, as_shards, hub_cache, repacked
from tests.published import PUBLISHED, write_published

PARTS = ("unet", "vae", "text_encoder")
Weights = dict[str, torch.Tensor]
Packaging = Callable[[str, Path, Path], str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of all models, by name."""
    root = tmp_path_factory.mktemp("published")
    return {name: write_published(name, root / name) for name in PUBLISHED}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))


def single_file(
    change: Callable[[Weights], Weights] | None = None, ending: str = ".safetensors"
) -> Packaging:
    """One file in the original layout, with ``change`` made to its tensors."""

    def write(name: str, folder: Path, tmp_path: Path) -> str:
        checkpoint = tmp_path / f"model{ending}"
        plain = write_checkpoint(folder, tmp_path / "plain.safetensors", open_clip=name != "v1-5")
        stored = load_file(plain)
        if change is not None:
            stored = change(stored)
        if ending == ".safetensors":
            save_file(stored, checkpoint)
        else:
            torch.save({"state_dict": stored}, checkpoint)
        return str(model_folder(str(checkpoint), str(folder)))

    return write


def with_averages(stored: Weights) -> Weights:
    averages = {}
    for name, weight in stored.items():
        if name.startswith(PREFIXES["unet"]):
            averages["model_ema." + name.removeprefix("model.").replace(".", "")] = weight + 1
    return {**stored, **averages}


def with_old_keys(stored: Weights) -> Weights:
    """Of SD 1.x. OpenCLIP, which SD 2.x has, never had others; its unused last layer is added."""
    old = {name.replace(f"{TEXT}text_model.", TEXT): weight for name, weight in stored.items()}
    for name, weight in stored.items():
        if "resblocks.0." in name:
            old[name.replace("resblocks.0.", "resblocks.1.")] = weight + 1
    return old


def in_half(stored: Weights) -> Weights:
    return {name: weight.half() for name, weight in stored.items()}


def in_bfloat16(stored: Weights) -> Weights:
    return {name: weight.bfloat16() for name, weight in stored.items()}


def of_parts(write: Callable) -> Packaging:
    return lambda name, folder, tmp_path: str(repacked(folder, tmp_path / "other", write))


def in_hub_cache(name: str, folder: Path, tmp_path: Path) -> str:
    hub_cache(folder, tmp_path)
    return str(tmp_path / "models--owner--name")


EXACT: dict[str, Packaging] = {
    ".bin only": of_parts(as_bin),
    "sharded": of_parts(as_shards),
    "hub cache": in_hub_cache,
    "single file": single_file(),
    "single file with averages": single_file(with_averages),
    "single file with old keys": single_file(with_old_keys),
    "ckpt": single_file(ending=".ckpt"),
}
ROUNDED: dict[str, Packaging] = {
    "fp16": single_file(in_half),
    "bf16": single_file(in_bfloat16),
}


def identities(model: str | Path) -> list[str]:
    folder = model_folder(str(model))
    return [weights_identity(folder / part) for part in PARTS]


@pytest.mark.parametrize("packaging", EXACT)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_same_values_are_the_same_model(
    models: dict[str, Path], tmp_path: Path, name: str, packaging: str
) -> None:
    other = EXACT[packaging](name, models[name], tmp_path)
    assert identities(other) == identities(models[name])


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", PUBLISHED)
def test_rounded_values_are_one_model_however_they_are_stored(
    models: dict[str, Path], tmp_path: Path, name: str, precision: str
) -> None:
    """The same rounding of a folder: as the only variant, and widened again."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def as_variant(part: Path, stem: str, weights: Weights) -> None:
        rounded = {key: weight.to(dtype) for key, weight in weights.items()}
        save_file(rounded, part / f"{stem}.{precision}.safetensors")

    def widened(part: Path, stem: str, weights: Weights) -> None:
        rounded = {key: weight.to(dtype).float() for key, weight in weights.items()}
        save_file(rounded, part / f"{stem}.safetensors")

    one_file = identities(ROUNDED[precision](name, models[name], tmp_path))
    assert identities(repacked(models[name], tmp_path / "variant", as_variant)) == one_file
    assert identities(repacked(models[name], tmp_path / "widened", widened)) == one_file
    assert not set(one_file) & set(identities(models[name]))


def stage_files(model: str | Path, out: Path) -> dict[str, str]:
    """The kind of prediction, the hashes of graphs and tokenizer, and the model's identity."""
    options = ExportOptions(model=str(model), out=out, dtype="fp32", height=16, width=16)
    bundle: Bundle = export_bundle(options)
    manifest = bundle.manifest
    assert manifest.one_step.scaling_factor == 0.18215
    kept = {
        "base_model": manifest.base_model.sha256,
        "predicts": manifest.one_step.prediction_type,
    }
    for path, sha256 in manifest.files.items():
        if path.endswith((".onnx", ".data", "tokenizer.json", "tensors.npz")):
            kept[path] = sha256
    return kept


# A full export takes seconds, so each model has another packaging.
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "packaging", "predicts"),
    [
        ("v1-5", "single file with old keys", "epsilon"),
        ("2-1", ".bin only", "v_prediction"),
    ],
)
def test_the_same_model_gives_the_same_bundle(
    models: dict[str, Path], tmp_path: Path, name: str, packaging: str, predicts: str
) -> None:
    other = EXACT[packaging](name, models[name], tmp_path)
    expected = stage_files(models[name], tmp_path / "expected")
    assert len([path for path in expected if path.endswith(".onnx")]) == 3
    assert expected["predicts"] == predicts
    assert stage_files(other, tmp_path / "other-bundle") == expected


# An export of the folder too would give the same, as all that it reads is compared here.
@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packaging"), [("2-1-base", "sharded"), ("sd-turbo", "hub cache")]
)
def test_the_same_folder_in_another_place_is_exported(
    models: dict[str, Path], tmp_path: Path, name: str, packaging: str
) -> None:
    other = EXACT[packaging](name, models[name], tmp_path)
    got = ModelParts.open(other)
    expected = ModelParts.open(str(models[name]))
    assert replace(got.config, folder=expected.config.folder) == expected.config
    assert got.info.sha256 == expected.info.sha256
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, part)().state_dict()
        ours = getattr(got, part)().state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    made = stage_files(other, tmp_path / "bundle")
    assert len([path for path in made if path.endswith(".onnx")]) == 3
    assert made["base_model"] == expected.info.sha256
    assert made["predicts"] == "epsilon"


def test_half_precision_beside_full_changes_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["v1-5"], tmp_path / "both"))
    halves = repacked(folder, tmp_path / "halves", as_fp16_variant)
    for part in PARTS:
        for path in (halves / part).glob("*.fp16.*"):
            shutil.copy(path, folder / part)
    assert identities(folder) == identities(models["v1-5"])
