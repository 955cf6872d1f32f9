"""Pickled files: nothing of them is run, and no tensor is larger than the file."""

import os
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.pickled import load_pickled
from hipa_deploy.models.weights.weight_file import load_tensors, read_layout


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    content = {"a": shared, "b": shared.view(2, 3), "n": [1, (2.0, "x")], "half": shared.half()}
    read = load_pickled(save(tmp_path / "a.pt", content))
    assert torch.equal(read["b"], content["b"])
    assert read["n"] == content["n"]
    old = tmp_path / "old.pt"
    torch.save(content, old, _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(old, mapped=True)["a"], shared)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("page", ["\n<!DOCTYPE html>", "<html>", '{"error":"Unauthorized"}'])
def test_a_page_in_place_of_a_file(tmp_path: Path, ending: str, page: str) -> None:
    """As a site sends it to who has no login, under the file's name."""
    path = tmp_path / f"model{ending}"
    path.write_text(page + " " * 100)
    for read in (load_tensors, read_layout if ending == ".safetensors" else load_pickled):
        with pytest.raises(HipaError, match="is a site's page or error, not the weights"):
            read(path)


def save_state(path: Path, callback: type) -> Path:
    """The weights and the state of a training, as Lightning saves them."""
    state = {"best_model_score": np.float64(0.1), "epoch": np.int64(3), "all": np.arange(3)}
    content = {
        "state_dict": {"w": torch.arange(3.0)},
        "callbacks": {callback: state},
        "loops": {"dtype": np.dtype("float32")},
    }
    return save(path, content)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_state_of_a_training_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Numpy's numbers and a class of Lightning, the names for which ComfyUI reads SD 1.x' files.

    Releases of numpy before 2.0 name their module otherwise.
    """
    name = "pytorch_lightning.callbacks.model_checkpoint"
    lightning = types.ModuleType(name)
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patched:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patched.setitem(sys.modules, package, types.ModuleType(package))
        patched.setitem(sys.modules, name, lightning)
        saved = save_state(tmp_path / "saved.ckpt", lightning.ModelCheckpoint)
    path = tmp_path / "old.ckpt"
    with zipfile.ZipFile(saved) as before, zipfile.ZipFile(path, "w") as after:
        for member in before.namelist():
            data = before.read(member)
            if member.endswith(".pkl"):
                data = re.sub(rb"numpy\._?core\.multiarray", module.encode(), data)
            after.writestr(member, data)
    for mapped in (False, True):
        read = load_pickled(path, mapped=mapped)
        assert torch.equal(read["state_dict"]["w"], torch.arange(3.0))
    (found,) = read["callbacks"].values()
    assert not isinstance(found["best_model_score"], float)  # nothing of numpy was called


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), r"its tensors would have \d+ bytes, the file"),
        ([torch.zeros(1).expand(10**6)] * 1000, r"its tensors would have \d+ bytes, the file"),
        (torch.eye(2).to_sparse(), "sparse or quantised"),
        (torch.empty(10**6, 10**6, device="meta"), "sparse or quantised"),
        ({"a": [Evil()]}, r"holds more than weights: \w+\.system|could run code"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = save(tmp_path / "a.pt", {"w": content})
    with pytest.raises(HipaError, match=message):
        load_pickled(path)
    assert not Path("executed").exists()


def test_containers_without_an_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.zeros(2)}
    content["self"] = content
    with pytest.raises(HipaError, match="nests too deep, or without an end"):
        load_pickled(save(tmp_path / "a.pt", content))
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(HipaError, match="nests too deep, or without an end"):
        load_pickled(save(tmp_path / "a.pt", deep))


def test_a_compressed_archive(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", torch.zeros(1000))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(HipaError, match=r"is compressed, which torch\.save never does"):
        load_pickled(path)


def test_no_regular_file_and_one_that_is_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(HipaError, match="is a pipe"):
        load_pickled(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    with pytest.raises(HipaError, match="is a device"):
        load_pickled(tmp_path / "zero.pt")
    path = save(tmp_path / "a.pt", torch.zeros(1000))
    with pytest.raises(HipaError, match="Expected at most 100"):
        load_pickled(path, max_bytes=100)
