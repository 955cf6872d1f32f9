"""Hostile files: each command works, or says what is wrong in one line and ends with exit code 1.

A few cases of each format run with the other tests. ``make fuzz`` runs thousands:
HIPA_FUZZ_CASES=300 is 300 of each format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hostile.formats import FORMATS
from tests.hostile.harness import Format, Samples, Worker, check_mutations, check_refused

CASES = int(os.environ.get("HIPA_FUZZ_CASES", "3"))

# Examples that once were tracebacks, hangs, crashes or wrong: format, edits.
KEPT = [
    ("manifest", [("set", ("one_step", "latent_shape"), [4, 0, 0])]),
    ("manifest", [("set", ("one_step", "width"), 10**12)]),
    ("manifest", [("set", ("batch",), 10**9)]),
    ("manifest", [("set", ("stages", 1, "spec", "name"), "../../../x")]),
    ("manifest", [("set", ("layout",), "generic")]),
    ("manifest", [("remove", ("stages", 2), None)]),
    ("manifest", [("remove", ("stages", 0), None)]),
    ("manifest", [("set", ("task",), "edit")]),
    ("manifest", [("set", ("stages", 2, "spec", "outputs", 0, "shape"), [1, 64, 64])]),
    ("manifest", [("set", ("one_step", "scaling_factor"), float("nan"))]),
    ("manifest", [("content", "deep list")]),
    ("manifest", [("content", "digits")]),
    ("manifest", [("sparse", 40 * 10**9)]),
    ("manifest", [("pipe",)]),
    ("manifest", [("device",)]),
    ("manifest", [("rename", ("files", "unet/model.onnx"), "\x1b[2J")]),
    ("manifest", [("rename", ("files", "unet/model.onnx"), "\ud800")]),
    ("tokenizer", [("set", ("padding", "strategy", "Fixed"), 10**12)]),
    ("tokenizer", [("set", ("padding", "pad_to_multiple_of"), 10**12)]),
    ("tokenizer", [("set", ("truncation", "max_length"), 0)]),
    ("tokenizer", [("sparse", 40 * 10**9)]),
    ("unet", [("sparse", 40 * 10**9)]),
    ("swap weights", [("sparse", 40 * 10**9)]),
    ("tokenizer", [("set", ("normalizer", "normalizers", 1, "content"), "x" * 100_000)]),
    ("tokenizer", [("set", ("normalizer", "normalizers", 1, "pattern", "Regex"), "(a+)+$")]),
    ("tokenizer", [("set", ("padding", "strategy"), "BatchLongest")]),
    ("tokenizer", [("set", ("padding", "strategy", "Fixed"), 7)]),
    ("swap", [("set", ("files",), {})]),
    ("swap", [("set", ("stage",), "generator"), ("set", ("base_files",), {})]),
    ("swap", [("set", ("weights",), {})]),
    ("swap weights", [("content", "zip without members")]),
    ("swap weights", [("content", "empty")]),
    ("swap weights", [("content", "text")]),
    ("reference tensors", [("bomb", "noise", 0)]),
    ("reference tensors", [("shape", "noise", 10**12)]),
    ("reference tensors", [("objects", "noise", 0)]),
    ("reference tensors", [("content", "empty")]),
    ("reference prompts", [("set", ("seeds",), [])]),
    ("reference prompts", [("set", ("seeds", 0), -1)]),
    ("baked contexts", [("shape", "", 10**12)]),
    ("baked contexts", [("objects", "", 0)]),
    ("baked contexts", [("content", "empty")]),
    ("unet", [("external", 3, "model.onnx")]),
    ("unet", [("operator", 3, "Loop")]),
    ("unet", [("content", "no text")]),
    ("sidecar", [("content", "deep table")]),
    ("sidecar", [("content", "digits")]),
    ("sidecar", [("set", ("key", "options", "workspace_mib"), 10**12)]),
]
BY_NAME = {what.name: what for what in FORMATS}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("what", FORMATS, ids=lambda what: what.name)
def test_the_sample_is_valid(what: Format, worker: Worker, samples: Samples) -> None:
    outcome = worker.run(samples.changed(what, []), what.command)
    # A diagnosis of an engine for another machine ends with 1, and prints it on stdout.
    assert outcome.code == 0 or what.name == "sidecar", outcome.printed


@pytest.mark.parametrize(("name", "edits"), KEPT)
def test_kept_examples(name: str, edits: list, worker: Worker, samples: Samples) -> None:
    check_refused(BY_NAME[name], edits, worker, samples)


@pytest.mark.parametrize("what", FORMATS, ids=lambda what: what.name)
def test_hostile_files(what: Format, worker: Worker, samples: Samples) -> None:
    check_mutations(what, worker, samples, CASES)
