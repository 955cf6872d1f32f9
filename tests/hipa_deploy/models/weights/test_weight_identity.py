"""One identity for one model in every packaging, and another for every other model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hipa_deploy.disk.hashing import folder_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.single_file import converted
from hipa_deploy.models.weights import weight_identity
from hipa_deploy.models.weights.weight_identity import PREFIX, has_identity, weights_identity
from tests.original_layout import write_checkpoint
from tests.packaging import (
    as_bin,
    as_fp16_variant,
    as_shards,
    hub_cache,
    repacked,
    with_old_attention,
)
from tests.tiny_model import make_model

PARTS = ("unet", "vae", "text_encoder")
UNET = "diffusion_pytorch_model.safetensors"
# torch's 8-bit types are no types of models that any command loads.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("identity") / "model", attention=True)


def identities(model: Path) -> list[str]:
    return [weights_identity(model / part) for part in PARTS]


@pytest.mark.parametrize("write", [as_bin, as_shards, with_old_attention])
def test_other_files_of_the_same_tensors(model: Path, tmp_path: Path, write: Callable) -> None:
    assert identities(repacked(model, tmp_path / "other", write)) == identities(model)


def test_links_and_a_single_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    assert identities(hub_cache(model, tmp_path)) == identities(model)
    checkpoint = write_checkpoint(model, tmp_path / "one.safetensors")
    assert identities(converted(checkpoint, str(model))) == identities(model)


def test_variants_beside_the_weights_do_not_count(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for part in PARTS:
        for path in list((folder / part).glob("*.safetensors")):
            halves = {name: weight.half() for name, weight in load_file(path).items()}
            save_file(halves, path.with_suffix(".fp16.safetensors"))
            save_file(halves, path.with_suffix(".non_ema.safetensors"))
    assert identities(folder) == identities(model)


def test_rounding_to_half_is_another_model_whose_packagings_agree(
    model: Path, tmp_path: Path
) -> None:
    variant = repacked(model, tmp_path / "variant", as_fp16_variant)
    assert not set(identities(variant)) & set(identities(model))
    # The rounded values, stored in float32.
    for part in PARTS:
        (path,) = (variant / part).glob("*.fp16.safetensors")
        widened = {name: weight.float() for name, weight in load_file(path).items()}
        before = weights_identity(variant / part)
        path.unlink()
        save_file(widened, variant / part / path.name.replace(".fp16", ""))
        assert weights_identity(variant / part) == before


@given(
    st.lists(st.floats(width=16), min_size=1, max_size=40),
    st.sampled_from(sorted(DTYPES)),
    st.booleans(),
)
def test_it_is_the_documented_hash_of_the_values_in_float32(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], dtype: str, pickled: bool
) -> None:
    folder = tmp_path_factory.mktemp("values")
    tensor = torch.tensor(values).to(DTYPES[dtype])
    if pickled:
        torch.save({"b": tensor, "a": tensor[:1, None]}, folder / "pytorch_model.bin")
    else:
        save_file({"b": tensor, "a": tensor[:1, None].clone()}, folder / "model.safetensors")

    # Independent of the module: torch widens, and the documented lines are hashed.
    wide = tensor.float().numpy().astype("<f4")
    hashes = [hashlib.sha256(part.tobytes()).hexdigest() for part in (wide[:1], wide)]
    text = f"a 1x1 {hashes[0]}\nb {len(values)} {hashes[1]}\n"
    expected = hashlib.sha256(text.encode()).hexdigest()
    # NaN has many patterns of bits, of which torch and numpy may keep different ones.
    if not np.isnan(wide).any():
        assert weights_identity(folder) == PREFIX + expected


def test_names_shapes_and_values_count(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    stored: list[dict[str, torch.Tensor]] = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(2, 3)},
        {"a": tensor.view(3, 2)},
        {"a": tensor + 1},
        {"a": tensor[:3].clone(), "b": tensor[3:].clone()},
    ]
    seen = set()
    for number, tensors in enumerate(stored):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / UNET)
        seen.add(weights_identity(folder))
    assert len(seen) == len(stored)


def test_chunks_and_position_numbers_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.arange(1000.0).to(torch.bfloat16)
    save_file({"a": tensor}, tmp_path / UNET)
    before = weights_identity(tmp_path)
    monkeypatch.setattr(weight_identity, "CHUNK", 7)
    assert weights_identity(tmp_path) == before
    save_file({"a": tensor, "embeddings.position_ids": torch.arange(77)}, tmp_path / UNET)
    assert weights_identity(tmp_path) == before


@pytest.mark.parametrize("name", [UNET, "diffusion_pytorch_model.bin"])
def test_numbers_that_no_model_is_loaded_from(tmp_path: Path, name: str) -> None:
    tensors = {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    if name == UNET:
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    with pytest.raises(HipaError, match=r"weight a is stored as \w+. Expected F64, F32, F16, BF16"):
        weights_identity(tmp_path)


def test_hashes_of_0_1_0_are_accepted(model: Path, tmp_path: Path) -> None:
    """It hashed every file of the folder; a download by id has the loaded ones alone."""
    recorded_alone = folder_sha256(model / "unet")
    assert has_identity(model / "unet", recorded_alone)
    folder = Path(shutil.copytree(model, tmp_path / "model")) / "unet"
    shutil.copy(folder / UNET, folder / "diffusion_pytorch_model.fp16.safetensors")
    recorded_with_variant = folder_sha256(folder)
    assert recorded_with_variant != recorded_alone
    assert has_identity(folder, recorded_with_variant)
    assert has_identity(folder, recorded_alone)
    assert has_identity(folder, weights_identity(model / "unet"))
    assert not has_identity(folder, "0" * 64)
    assert not has_identity(folder, PREFIX + "0" * 64)
    with pytest.raises(HipaError, match=r"is of a later version of hipa-deploy. Install"):
        has_identity(folder, "tensors-v2:" + "0" * 64)
