"""Hashes of unchanged files are remembered, and no change goes unseen."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import pytest

from hipa_deploy.disk import remembered
from hipa_deploy.disk.files import user_cache
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.remembered import RememberedHashes, private_folder
from hipa_deploy.errors import HipaError, HipaWarning


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HIPA_CACHE", str(cache))
    # So that files which a test has just written count as settled.
    monkeypatch.setattr(remembered, "_SETTLED_NS", -1)
    return cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed."""
    read = []

    def recording(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(remembered, "file_sha256", recording)
    return read


def weights(folder: Path, content: bytes = b"one") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "weights.bin"
    path.write_bytes(content)
    return path


def sha256(path: Path, *, again: bool = False) -> str:
    """The hash, as a start of a program finds it."""
    hashes = RememberedHashes(path.parent)
    found = hashes.sha256(path, again=again)
    hashes.save()
    return found


def test_an_unchanged_file_is_read_once(tmp_path, reads):
    path = weights(tmp_path / "b")
    assert sha256(path) == sha256(path) == file_sha256(path)
    assert reads == [path]
    sha256(path, again=True)
    assert reads == [path, path]


def test_another_content_of_the_same_size_and_mtime_is_found(tmp_path):
    path = weights(tmp_path / "b")
    sha256(path)
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert sha256(path) == file_sha256(path)


def test_another_file_of_the_same_size_and_mtime_in_its_place_is_found(tmp_path):
    path = weights(tmp_path / "b")
    sha256(path)
    before = path.stat()
    other = weights(tmp_path / "c", b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert sha256(path) == file_sha256(path)


def test_a_link_that_leads_to_another_file_is_found(tmp_path, reads):
    first = weights(tmp_path / "first")
    second = weights(tmp_path / "second", b"two")
    folder = tmp_path / "b"
    folder.mkdir()
    link = folder / "weights.bin"
    link.symlink_to(first)
    assert sha256(link) == file_sha256(first)
    link.unlink()
    link.symlink_to(second)
    assert sha256(link) == file_sha256(second)


def test_what_was_written_a_moment_ago_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(remembered, "_SETTLED_NS", 3_000_000_000)
    path = weights(tmp_path / "b")
    sha256(path)
    sha256(path)
    assert reads == [path, path]
    # Three seconds later.
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns + 3_000_000_001)
    sha256(path)
    sha256(path)
    assert reads == [path] * 3


def test_what_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    path = weights(tmp_path / "b")

    def changing(read: Path) -> str:
        found = file_sha256(read)
        path.write_bytes(b"two")
        return found

    monkeypatch.setattr(remembered, "file_sha256", changing)
    sha256(path)
    monkeypatch.setattr(remembered, "file_sha256", file_sha256)
    assert sha256(path) == file_sha256(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"format": 1, "files": []}', '{"format": 2, "files": {}}'],
)
def test_a_damaged_record_counts_as_empty(tmp_path, own_cache, reads, content):
    path = weights(tmp_path / "b")
    sha256(path)
    (record,) = (own_cache / "hashes").iterdir()
    record.write_text(content)
    sha256(path)
    assert reads == [path, path]


@pytest.mark.parametrize("entry", [None, {}, {"sha256": "0", "marks": [1]}, {"sha256": 0}])
def test_a_damaged_entry_counts_as_missing(tmp_path, own_cache, reads, entry):
    path = weights(tmp_path / "b")
    sha256(path)
    (record,) = (own_cache / "hashes").iterdir()
    record.write_text(json.dumps({"format": 1, "files": {str(path): entry}}))
    assert sha256(path) == file_sha256(path)
    assert reads == [path, path]


@pytest.mark.skipif(os.name != "posix", reason="no modes of files")
@pytest.mark.parametrize("name", ["hashes", "record"])
def test_a_record_that_others_can_write_is_not_believed(tmp_path, own_cache, name):
    path = weights(tmp_path / "b")
    true_hash = sha256(path)
    (record,) = (own_cache / "hashes").iterdir()
    record.write_text(record.read_text().replace(true_hash, "f" * 64))
    assert sha256(path) == "f" * 64  # the user's own record is believed
    (record if name == "record" else record.parent).chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HipaWarning)
        assert sha256(path) == true_hash


@pytest.mark.skipif(os.name != "posix", reason="no modes of files")
def test_a_cache_of_others_is_not_written(tmp_path):
    folder = tmp_path / "cache" / "hashes"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(HipaError, match=r"can be written by other users\. Remove it, or set HIPA"):
        private_folder(folder)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(HipaError, match="is a link"):
        private_folder(folder)


def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "file"))
    path = weights(tmp_path / "b")
    with pytest.warns(HipaWarning, match="every start reads all files") as caught:
        assert sha256(path) == file_sha256(path)
    assert len(caught) == 1


def test_a_system_without_ctime_remembers_nothing(tmp_path, own_cache, reads, monkeypatch):
    monkeypatch.setattr(remembered, "_has_ctime", False)
    path = weights(tmp_path / "b")
    sha256(path)
    sha256(path)
    assert reads == [path, path]
    assert not own_cache.exists()


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch):
    monkeypatch.delenv("HIPA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert user_cache() == Path("/var/cache/me/hipa-deploy")
    # The specification: a path that is not absolute is ignored.
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert user_cache() == Path.home() / ".cache" / "hipa-deploy"


def test_the_cache_of_a_user_without_a_home_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPA_CACHE", "~/models")
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache() == Path("/home/me/models")

    def no_home(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HIPA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    path = weights(tmp_path / "b")
    hashes = RememberedHashes(path.parent)
    hashes.sha256(path)
    with pytest.warns(HipaWarning, match="Set HIPA_CACHE to a folder that can be written"):
        hashes.save()
