"""A stranger's bundle, its hashes corrected: what is read is listed, lies inside and matches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import FOLDER, MANIFEST, AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk import remembered
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.backends.onnxruntime_runner import engine_cache
from hipa_deploy.engines.store.sidecar import engine_folder, find_sidecars
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import put_engine, save_conv, write_bundle
from tests.swap_samples import scaled_weights, write_swap


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../../../x", "/tmp/x", "unet/../../x", "UNet", "a\0b", "", "text_encoder+unet"]
)
def test_stages_have_names_of_a_closed_set(root: Path, name: str) -> None:
    change(root / "hipa.json", lambda it: it["stages"][1]["spec"].update(name=name))
    with pytest.raises(
        HipaError, match=r"stages\.1\.spec.* (is unknown, expected one of: text_enc|.* character)"
    ):
        Bundle.open(root)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "unet\\model.onnx", "C:x"])
def test_names_of_files_stay_in_the_bundle(root: Path, name: str) -> None:
    change(root / "hipa.json", lambda it: it["stages"][1].update(path=name))
    with pytest.raises(HipaError, match="the file name"):
        Bundle.open(root)
    change(root / "hipa.json", lambda it: it["stages"][1].update(path="unet/model.onnx"))
    change(root / "hipa.json", lambda it: it["files"].update({name: "0" * 64}))
    with pytest.raises(HipaError, match="the file name"):
        Bundle.open(root)


def test_a_link_out_of_the_bundle_is_refused_though_its_hash_is_right(root: Path) -> None:
    outside = root.parent / "model.onnx"
    shutil.move(root / "unet/model.onnx", outside)
    (root / "unet/model.onnx").symlink_to(outside)
    with pytest.raises(HipaError, match="is a link that leads out"):
        Bundle.open(root).verify()


def test_a_bundle_in_a_hub_cache_is_links_and_loads(root: Path) -> None:
    repository = root.parent / "models--owner--name"
    snapshot = repository / "snapshots/1234"
    (repository / "blobs").mkdir(parents=True)
    for path in list(root.rglob("*.*")):
        blob = repository / "blobs" / file_sha256(path)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    Bundle.open(snapshot).verify()
    (repository / "blobs" / file_sha256(root / "unet/model.onnx")).write_bytes(b"tampered")
    with pytest.raises(HipaError, match="corrupt"):
        Bundle.open(snapshot).verify()


def test_the_package_may_be_installed_as_links(tmp_path: Path) -> None:
    """As uv's ``link-mode = "symlink"`` does; a stranger's bundle may not be links all the same."""
    installed = tmp_path / "site-packages/hipa_deploy"
    repository = Path(__file__).parents[3]

    def link(folder: Path, to: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, to, ignore=ignored, copy_function=os.symlink)

    link(repository / "hipa_deploy", installed)
    link(repository / "engines", installed / "engines")
    link(BUNDLE, tmp_path / "strange")

    def generate(bundle: str) -> subprocess.CompletedProcess[str]:
        words = ["-m", "hipa_deploy", "generate", bundle, "a cat", "--backend", "onnxruntime"]
        return subprocess.run(
            [sys.executable, *words, "--out", f"{bundle}.png"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed.parent)},
            capture_output=True,
            text=True,
        )

    own = generate("emoji")
    assert own.returncode == 0, own.stderr
    strange = generate("strange")
    assert strange.returncode == 1
    assert "is a link that leads out of strange" in strange.stderr
    assert not (tmp_path / "strange.png").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_hashed(root: Path, kind: str) -> None:
    path = root / "unet/model.onnx"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(HipaError, match=f"is a {kind}"):
        Bundle.open(root).verify()


def test_weights_in_a_file_without_a_hash_are_refused(tmp_path: Path) -> None:
    save_conv(tmp_path / "unet/model.onnx", np.float16, external=True)
    bundle = write_bundle(tmp_path)
    bundle.verify()
    assert bundle.weight_files("unet") == ["unet/model.onnx.data"]
    change(tmp_path / "hipa.json", lambda it: it["files"].pop("unet/model.onnx.data"))
    with pytest.raises(HipaError, match=r"unet/model\.onnx\.data is not listed in hipa\.json"):
        Bundle.open(tmp_path).verify()


def test_weights_in_the_folder_of_another_stage_are_refused(tmp_path: Path) -> None:
    for stage in ("unet", "vae_decoder"):
        save_conv(tmp_path / stage / "model.onnx", np.float16, external=True)
    content = (tmp_path / "unet/model.onnx").read_bytes()
    bundle = write_bundle(tmp_path)
    # Of the same length, so that the file stays whole: 15 characters.
    moved = content.replace(b"model.onnx.data", b"../vae_decoder/")
    (tmp_path / "unet/model.onnx").write_bytes(moved)
    sha256 = file_sha256(tmp_path / "unet/model.onnx")
    change(bundle.root / "hipa.json", lambda it: it["files"].update({"unet/model.onnx": sha256}))
    with pytest.raises(HipaError, match="is not listed"):
        Bundle.open(tmp_path).verify()


def test_a_configuration_beside_the_graph_is_no_weight(root: Path) -> None:
    """The layout generic has config.json there: keys of engines must not change by it."""
    bundle = Bundle.open(root)
    assert "unet/weights.json" in bundle.manifest.files
    assert bundle.weight_files("unet") == []


@pytest.fixture
def swap(root: Path) -> Path:
    bundle = Bundle.open(root)
    return write_swap(bundle, root / FOLDER / "night", scaled_weights(bundle, 0.5))


@pytest.mark.parametrize("kept", [(), ("weights.npz",), ("reference.npy",)])
def test_a_swap_whose_files_have_no_hash_is_refused(
    root: Path, swap: Path, kept: tuple[str, ...]
) -> None:
    AdaptorSwap.open(Bundle.open(root), "night")

    def forget(content: dict[str, Any]) -> None:
        content["files"] = {name: content["files"][name] for name in kept}

    change(swap / MANIFEST, forget)
    with pytest.raises(HipaError, match=r"has no hash|is not of an adaptor"):
        AdaptorSwap.open(Bundle.open(root), "night")


def test_a_swap_cannot_have_files_elsewhere_hashed(root: Path, swap: Path) -> None:
    change(swap / MANIFEST, lambda it: it["files"].update({"../../../x": "0" * 64}))
    with pytest.raises(HipaError, match=r"the file name|is not of an adaptor"):
        AdaptorSwap.open(Bundle.open(root), "night")


def test_a_swap_for_a_stage_that_the_bundle_lacks_is_refused(root: Path, swap: Path) -> None:
    change(swap / MANIFEST, lambda it: it.update(stage="generator", base_files={}))
    with pytest.raises(HipaError, match="for another bundle"):
        AdaptorSwap.open(Bundle.open(root), "night")


def test_links_of_a_swap_stay_in_its_folder(root: Path, swap: Path) -> None:
    shutil.move(swap / "weights.npz", root.parent / "weights.npz")
    (swap / "weights.npz").symlink_to(root.parent / "weights.npz")
    with pytest.raises(HipaError, match="leads out"):
        AdaptorSwap.open(Bundle.open(root), "night")


def test_no_engine_is_written_or_read_through_a_link_out_of_the_bundle(tmp_path: Path) -> None:
    save_conv(tmp_path / "bundle/unet/model.onnx", np.float16)
    bundle = write_bundle(tmp_path / "bundle")
    sidecar = put_engine(bundle)
    assert find_sidecars(bundle, "unet", "tensorrt")

    # The lock is opened for writing, and emptied.
    diary = tmp_path / "diary"
    diary.write_text("dear diary")
    (sidecar.parent / ".lock").symlink_to(diary)
    with pytest.raises(HipaError, match="leads out"):
        engine_folder(bundle, "tensorrt", "t")

    shutil.move(bundle.root / "engines", tmp_path / "engines")
    (bundle.root / "engines").symlink_to(tmp_path / "engines")
    for use in (
        lambda: engine_folder(bundle, "tensorrt", "t"),
        lambda: find_sidecars(bundle, "unet", "tensorrt"),
        lambda: engine_cache(bundle, "unet", "onnxruntime-tensorrt"),
    ):
        with pytest.raises(HipaError, match="leads out"):
            use()


@pytest.mark.parametrize("name", ["unet/model.onnx", "tokenizer/tokenizer.json"])
def test_a_change_after_the_first_start_is_found(tmp_path, monkeypatch, name):
    """A content of the same size and mtime, in a bundle whose hashes are remembered."""
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_SETTLED_NS", -1)
    root = tmp_path / "b"
    shutil.copytree(BUNDLE, root)
    OneStepPipeline.load(root, "onnxruntime").close()
    with monkeypatch.context() as nothing_is_read:
        nothing_is_read.setattr(remembered, "file_sha256", pytest.fail)
        OneStepPipeline.load(root, "onnxruntime").close()

    path = root / name
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(HipaError, match="is corrupt: its SHA-256 is not the manifest's"):
        OneStepPipeline.load(root, "onnxruntime")


def test_verify_reads_what_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_SETTLED_NS", -1)
    OneStepPipeline.load(BUNDLE, "onnxruntime").close()
    read = []
    monkeypatch.setattr(
        remembered, "file_sha256", lambda path: read.append(path) or file_sha256(path)
    )
    OneStepPipeline.load(BUNDLE, "onnxruntime").close()
    assert read == []
    OneStepPipeline.load(BUNDLE, "onnxruntime", verify=True).close()
    assert len(read) == len(Bundle.open(BUNDLE).manifest.files)


def test_a_record_of_another_hash_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_SETTLED_NS", -1)
    Bundle.open(BUNDLE).verify(remembered=True)
    (record,) = (tmp_path / "cache" / "hashes").iterdir()
    record.write_text(record.read_text().replace('"sha256": "', '"sha256": "f'))
    Bundle.open(BUNDLE).verify(remembered=True)
