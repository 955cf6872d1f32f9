"""One file of weights: layout without torch, tensors with it, and files that are none."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.weight_file import (
    each_tensor,
    is_pickled,
    load_tensors,
    read_layout,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4).to(torch.bfloat16)}


def test_the_layout_says_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    layouts = read_layout(path)
    assert {name: (layout.dtype, layout.shape) for name, layout in layouts.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }
    start, end = layouts["a"][2:]
    assert path.read_bytes()[start:end] == TENSORS["a"].numpy().tobytes()


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_one_by_one_they_are_the_same(tmp_path: Path, name: str) -> None:
    """Half precision is read into memory of its own, everything else as ever."""
    path = tmp_path / name
    tensors = {**TENSORS, "c": torch.randn(3, 5).half(), "none": torch.zeros(0, 2).half()}
    if name.endswith("bin"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    found = dict(each_tensor(path))
    assert found.keys() == tensors.keys()
    for key, value in found.items():
        assert value.dtype == tensors[key].dtype
        assert torch.equal(value, tensors[key])


def test_a_file_in_half_precision_is_not_mapped(tmp_path: Path) -> None:
    """A map would hold all pages that were read beside the converted weights."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1 << 20).half(), "b": torch.ones(1 << 20).bfloat16()}, path)
    kept = [value.float() for _, value in each_tensor(path)]
    for _ in each_tensor(path):
        assert str(path) not in Path("/proc/self/maps").read_text()
    assert all(value.sum() == 1 << 20 for value in kept)


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.bin", "a.PT", "a.pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_of_every_kind_of_file(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    if "safe" in name.lower():
        save_file(TENSORS, path)
    else:
        content = {"state_dict": {"state_dict": {**TENSORS, "epoch": 3, 4: torch.zeros(1)}}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    tensors = load_tensors(path)
    assert tensors.keys() == TENSORS.keys()
    for key, value in tensors.items():
        assert value.dtype == TENSORS[key].dtype
        assert torch.equal(value, TENSORS[key])


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_file_that_was_cut_off(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    if name == "a.bin":
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(HipaError, match=r"is damaged: .*Copy it again") as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_of_weights(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"is a \.zip file. Expected weights in a file that ends"):
        is_pickled(tmp_path / "model.zip")
    with pytest.raises(HipaError, match=r"absent.bin is missing"):
        load_tensors(tmp_path / "absent.bin")
    for ending in ("safetensors", "bin"):
        path = tmp_path / f"model.{ending}"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        with pytest.raises(HipaError, match="is a Git LFS pointer"):
            load_tensors(path)


def test_a_checkpoint_of_a_lightning_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published .ckpt files of SD 1.x: their callbacks name Lightning's own classes."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = torch.zeros(1)

    ModelCheckpoint.__module__ = name
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    weights = {"w": torch.arange(3.0)}
    callbacks = {ModelCheckpoint: {"best_model_score": torch.ones(1)}, "own": ModelCheckpoint()}
    torch.save({"state_dict": weights, "callbacks": callbacks}, tmp_path / "model.ckpt")

    # Where it is read, Lightning is not installed.
    monkeypatch.delitem(sys.modules, name)
    assert torch.equal(load_tensors(tmp_path / "model.ckpt")["w"], weights["w"])
    assert name not in sys.modules
