"""Pickled files: nothing of them is run, and no tensor is larger than the file."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.pickled import load_pickled


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
