"""Compiled stages in the user's cache: equal results, and no entry where it does not belong."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.backends import compiled_cache
from hipa_deploy.engines.backends.compiled_cache import compiled_stage
from hipa_deploy.engines.backends.onnxruntime_compiled import saves_packed
from hipa_deploy.errors import HipaError, HipaWarning
from hipa_deploy.generate.open_stages import open_runner
from tests.engines.engine_samples import SHAPE

X = {"x": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_cache, "SMALLEST", 0)
    monkeypatch.setattr(compiled_cache, "_warned", set())
    return tmp_path / "cache" / "compiled"


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request) -> str:
    pytest.importorskip(request.param)
    return request.param


def run(bundle: Bundle, backend: str, kept: str = "use", stage: str = "vae_decoder") -> np.ndarray:
    """The stage's output; 'vae_decoder' has its weights in another file."""
    with open_runner(bundle, stage, backend, kept=kept) as runner:
        return runner(**X)["y"]


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} if cache.is_dir() else set()


@pytest.mark.parametrize(
    ("version", "safe"), [("1.20.1", False), ("1.31.1", False), ("1.32.0", True), ("2.0.0", True)]
)
def test_what_onnxruntime_packed_is_kept_where_it_aligns_it(version, safe):
    assert saves_packed(version) == safe


def test_what_is_packed_begins_at_a_multiple_of_64_bytes(cache):
    """The processor's instructions for packed weights end the process where they do not."""
    onnx = pytest.importorskip("onnx")
    OneStepPipeline.load(BUNDLE, "onnxruntime").close()
    offsets = []
    for path in cache.glob("onnxruntime-*/model.onnx"):
        for weight in onnx.load(path, load_external_data=False).graph.initializer:
            for entry in weight.external_data:
                # 'KERNEL+HASH|OFFSET;BYTES;CHECKSUM', and more blobs after another '|'
                if entry.key.startswith("prepacked"):
                    blobs = entry.value.split("|")[1:]
                    offsets += [int(blob.split(";")[0]) for blob in blobs]
    assert bool(offsets) == saves_packed(onnxruntime.__version__)
    assert all(offset % 64 == 0 for offset in offsets)


@pytest.fixture
def compilations(monkeypatch) -> list[Path]:
    """The entries that are made."""
    made = []
    write = compiled_cache.CompiledStage.write

    def recording(self, make):
        made.append(self.folder)
        return write(self, make)

    monkeypatch.setattr(compiled_cache.CompiledStage, "write", recording)
    return made


def test_an_entry_gives_the_same_bits_and_is_made_once(make_bundle, backend, compilations, cache):
    bundle = make_bundle()
    expected = run(bundle, backend, "none")
    assert not cache.exists()
    for _ in range(3):
        np.testing.assert_array_equal(run(bundle, backend), expected)
    assert len(compilations) == 1
    np.testing.assert_array_equal(run(bundle, backend, "renew"), expected)
    assert len(compilations) == 2
    assert len(entries(cache)) == 1


def test_a_whole_pipeline_gives_the_same_images(backend, compilations):
    images = []
    for options in ({"cache": False}, {}, {}, {"verify": True}):
        with OneStepPipeline.load(BUNDLE, backend, **options) as pipe:
            images.append(pipe("3d emoji of a red apple", seed=3).images_BHWC)
    for other in images[1:]:
        np.testing.assert_array_equal(other, images[0])
    # Three stages the first time, and again where they are verified.
    assert len(compilations) == 6


def test_a_runner_that_is_closed_leaves_the_entry_usable(make_bundle, backend):
    bundle = make_bundle()
    first = open_runner(bundle, "unet", backend, kept="use")
    second = open_runner(bundle, "unet", backend, kept="use")
    expected = first(**X)["y"]
    first.close()
    np.testing.assert_array_equal(second(**X)["y"], expected)
    second.close()
    with pytest.raises(HipaError, match="closed"):
        second(**X)


def other_weights(bundle: Bundle) -> Bundle:
    """The bundle with the decoder's weights doubled, in a file of the same size and times."""
    data = bundle.root / "vae_decoder" / "model.onnx.data"
    times = data.stat()
    weights = np.frombuffer(data.read_bytes(), np.float16) * 2
    data.write_bytes(weights.astype(np.float16).tobytes())
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    return reopened(bundle.root)


def reopened(root: Path) -> Bundle:
    """The bundle after its manifest got the hashes of its files."""
    from hipa_deploy.disk.hashing import file_sha256

    manifest = json.loads((root / "hipa.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = file_sha256(root / name)
    (root / "hipa.json").write_text(json.dumps(manifest))
    return Bundle.open(root)


def test_other_weights_in_another_file_are_another_entry(make_bundle, backend):
    """The graph's own file, its path and its times are unchanged: OpenVINO's key would be equal."""
    bundle = make_bundle()
    before = run(bundle, backend)
    changed = other_weights(bundle)
    after = run(changed, backend)
    np.testing.assert_array_equal(after, run(changed, backend, "none"))
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("what", ["cpu_features", "cpu_name", "version", "limit"])
def test_another_processor_or_version_is_another_entry(make_bundle, cache, monkeypatch, what):
    bundle = make_bundle()
    run(bundle, "onnxruntime")
    if what == "version":
        monkeypatch.setattr("onnxruntime.__version__", "99.0")
    elif what == "limit":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    else:
        monkeypatch.setattr(compiled_cache, what, lambda: "another")
    run(bundle, "onnxruntime")
    assert len(entries(cache)) == 2


def test_an_unknown_processor_keeps_nothing(make_bundle, cache, monkeypatch):
    monkeypatch.setattr(compiled_cache, "cpu_features", lambda: None)
    run(make_bundle(), "onnxruntime")
    assert entries(cache) == set()


def content(cache: Path, name: str = "") -> Path:
    """A file of the one entry: the largest, or the one with this name."""
    (entry,) = cache.iterdir()
    if name:
        return entry / name
    return max(entry.iterdir(), key=lambda path: path.stat().st_size)


def overwrite(path: Path) -> None:
    """Another content of the same size and mtime."""
    times = path.stat()
    path.write_bytes(bytes(times.st_size))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def without_a_time(path: Path) -> None:
    """As written a moment ago, but not when."""
    entry = path.with_name("entry.json")
    content = json.loads(entry.read_text())
    entry.write_text(json.dumps(content | {"synced": False, "written": None}))


@pytest.mark.parametrize(
    "damage",
    [
        overwrite,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        Path.unlink,
        lambda path: path.with_name("entry.json").write_text("{"),
        lambda path: path.with_name("entry.json").write_text("[]"),
        lambda path: path.with_name("entry.json").unlink(),
        without_a_time,
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
    ],
)
def test_a_damaged_entry_is_made_again(make_bundle, backend, compilations, cache, damage):
    bundle = make_bundle()
    expected = run(bundle, backend)
    damage(content(cache))
    np.testing.assert_array_equal(run(bundle, backend), expected)
    assert len(compilations) == 2
    np.testing.assert_array_equal(run(bundle, backend), expected)
    assert len(compilations) == 2


def test_an_entry_that_the_library_refuses_is_no_error(make_bundle, backend, cache, monkeypatch):
    """As ``overwrite``, but unseen: the library's own check is the last one."""
    bundle = make_bundle()
    expected = run(bundle, backend)
    largest = content(cache) if backend == "openvino" else content(cache, "model.onnx")
    largest.write_bytes(b"nonsense")
    monkeypatch.setattr(compiled_cache.CompiledStage, "found", lambda self: True)
    np.testing.assert_array_equal(run(bundle, backend), expected)
    assert entries(cache) == set()  # discarded


def test_what_was_not_on_the_disk_at_a_crash_is_not_taken(
    make_bundle, compilations, cache, monkeypatch
):
    bundle = make_bundle()
    run(bundle, "onnxruntime")
    monkeypatch.setattr(compiled_cache, "_boot", lambda: "another start of the system")
    run(bundle, "onnxruntime")
    assert len(compilations) == 2
    # A minute later it is on the disk, and outlives the next start of the system.
    monkeypatch.setattr(compiled_cache, "_SYNC_AFTER", -1)
    run(bundle, "onnxruntime")
    monkeypatch.setattr(compiled_cache, "_boot", lambda: "a third start")
    run(bundle, "onnxruntime")
    assert len(compilations) == 2


@pytest.mark.parametrize("problem", ["file", "others", "disk"])
def test_a_cache_that_cannot_be_written_costs_one_warning(
    make_bundle, backend, cache, monkeypatch, problem
):
    bundle = make_bundle()
    if problem == "file":
        cache.parent.write_bytes(b"")
    elif problem == "others":
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    else:
        monkeypatch.setattr(compiled_cache, "free_bytes", lambda _: 0)
    expected = run(bundle, backend, "none")
    with pytest.warns(HipaWarning, match=r"compiled stages cannot be kept .* Set HIPA_CACHE"):
        np.testing.assert_array_equal(run(bundle, backend), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(run(bundle, backend), expected)
    assert entries(cache) == set()


def test_a_failed_compilation_leaves_nothing_and_the_error_is_of_the_graph(
    make_bundle, backend, cache
):
    bundle = make_bundle()
    (bundle.root / "unet" / "model.onnx").write_bytes(b"\x08nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one line, and it is the error
        with pytest.raises(HipaError, match=r"model\.onnx"):
            run(bundle, backend, stage="unet")
    assert entries(cache) == set()


def test_the_oldest_entries_are_removed(make_bundle, cache, monkeypatch):
    bundle = make_bundle()
    run(bundle, "onnxruntime", stage="unet")
    (first,) = entries(cache)
    os.utime(cache / first / "entry.json", (1, 1))
    monkeypatch.setattr(compiled_cache, "LARGEST_CACHE", 1)
    run(bundle, "onnxruntime")
    assert first not in entries(cache)
    assert len(entries(cache)) == 1


def test_a_copied_bundle_uses_the_entries(make_bundle, backend, compilations, tmp_path):
    bundle = make_bundle()
    expected = run(bundle, backend)
    shutil.copytree(bundle.root, tmp_path / "copy")
    np.testing.assert_array_equal(run(Bundle.open(tmp_path / "copy"), backend), expected)
    assert len(compilations) == 1


def test_an_entry_says_what_it_is_of(make_bundle):
    bundle = make_bundle()
    run(bundle, "onnxruntime")
    compiled = compiled_stage(bundle, "vae_decoder", "onnxruntime", dict)
    assert compiled is not None
    assert not compiled.found()  # other options
    entry = json.loads(next(compiled.folder.parent.glob("*/entry.json")).read_text())
    assert entry["identity"]["files"].keys() == {
        "vae_decoder/model.onnx",
        "vae_decoder/model.onnx.data",
    }
