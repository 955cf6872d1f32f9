"""Abusive command lines: each works, or is one line and exit code 1, within its time and memory.

The words are drawn from what a program or a slip of the hand may give: numbers without measure,
names that no disk takes, links in a circle, pipes, devices, folders in place of files. Hostile
contents of files are in tests/hostile/test_hostile.py.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.hostile.harness import Worker
from tests.hostile.test_early_refusals import HEAVY

CASES = int(os.environ.get("HIPA_FUZZ_CASES", "8"))

NUMBERS = [
    "0", "1", "-1", "2", "7", "63", "64", "65", "1000", str(2**31), str(2**63), str(10**9),
    str(10**12), str(10**30), "9" * 5000, "0.5", "1e9", "nan", "inf", "-inf", "x", "", " 1 ", "٣",
]  # fmt: skip
PATHS = [
    "", ".", "..", "/", "nope", "nope/nope", "file.txt", "file.txt/new", "loop", "loop/new", "fifo",
    "folder", "empty", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "sparse",
    "x" * 300, "x/" * 3000, "a\nb", "\x1b[2J", "\udcff", "\u202e", "-", "--", "~", "*", "photo.png",
    "photo.png/", "name:0.8", ":", "=", "é" * 127, "image.png", "report.json", "new.png", "new",
]  # fmt: skip
TEXTS = [
    "a red apple", "", " ", "\udcff\udcfe", "\0", "x" * 120_000, "(" * 5000, "((a:1.5)", "a:" * 999,
    "\u200b" * 500, "😀" * 500, "a\nb", "--prompts", "\x1b]0;x\x07", "🏳️‍🌈",
]  # fmt: skip
WORDS = [
    "auto", "onnxruntime", "full", "tiny", "none", "emoji", "emoji-edit", "sd15", "hyper-sd15",
    "edit", "rtx40", "batch=1:1:4", "height=64:64:128", f"height=1:1:{10**30}", "0.75,0.5", "nan",
    "," * 5000, "a=b", "os:abort", "\udcff",
]  # fmt: skip

# A command, its arguments and the kinds of words that its options take. Options with other values
# than these would start minutes of honest work: a training, an export or a build.
COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "generate": (
        ("bundle", "text"),
        {
            "--out": PATHS, "--seed": NUMBERS, "--count": NUMBERS[:4] + NUMBERS[9:],
            "--height": NUMBERS, "--width": NUMBERS, "--adaptor": PATHS, "--backend": WORDS,
            "--truncate": [], "--prompt-weights": [], "--force": [],
            "--checker": WORDS + PATHS,
        },
    ),
    "edit": (
        ("bundle", "image", "text"),
        {"--strength": NUMBERS, "--out": PATHS, "--seed": NUMBERS, "--count": NUMBERS[9:]},
    ),
    "inpaint": (
        ("bundle", "image", "image", "text"),
        {"--feather": NUMBERS, "--out": PATHS, "--height": NUMBERS, "--adaptor": PATHS},
    ),
    "upscale": (("bundle", "image", "text"), {"--overlap": NUMBERS, "--out": PATHS}),
    "control": (("bundle", "image", "text"), {"--scale": NUMBERS, "--out": PATHS}),
    "profile": (
        ("bundle",),
        {
            "--runs": NUMBERS[:4] + NUMBERS[9:], "--warmup": NUMBERS[:4] + NUMBERS[9:],
            "--json": PATHS, "--html": PATHS, "--roofline": WORDS, "--backend": WORDS,
        },
    ),
    "profile compare": (("path", "path"), {"--threshold": NUMBERS, "--json": PATHS}),
    "profile table": (("path", "path"), {}),
    "doctor": (("bundle",), {"--backend": WORDS, "--json": []}),
    "build": (
        ("bundle",),
        {
            "--backend": ["rtx", "tensorrt", "x"], "--target": WORDS, "--workspace": NUMBERS,
            "--tactic-dram": NUMBERS, "--optimization-level": NUMBERS, "--best-of": NUMBERS,
            "--timing-cache": PATHS, "--swap": NUMBERS, "--dry-run": [],
        },
    ),
}  # fmt: skip
# Commands of which only the checks run: what these let pass would import torch.
CHECKED: dict[str, dict[str, list[str]]] = {
    "export": {
        "--out": PATHS, "--model": PATHS[:30], "--adaptor": [*PATHS, "emoji", "emoji-edit"],
        "--adaptor-scale": NUMBERS, "--lora": PATHS, "--embedding": PATHS, "--one-step": WORDS,
        "--height": NUMBERS, "--width": NUMBERS, "--batch": NUMBERS, "--decoder": PATHS,
        "--encoder": PATHS, "--prompts": PATHS, "--dynamic": WORDS, "--strengths": WORDS,
        "--context-tokens": NUMBERS, "--clip-skip": NUMBERS, "--swap-for": PATHS,
        "--layout": ["onestep", "generic", "x"], "--task": ["edit", "inpaint", "x"], "--fuse": [],
    },
    "evaluate": {
        "--adaptor": PATHS, "--one-step": WORDS, "--rival": WORDS + PATHS, "--model": PATHS[:30],
        "--lora": PATHS, "--embedding": PATHS, "--recipe": PATHS, "--prompts": PATHS,
        "--images": NUMBERS, "--json": PATHS, "--out": PATHS, "--clip-skip": NUMBERS,
    },
    "train": {
        "--out": PATHS, "--recipe": PATHS + WORDS, "--model": PATHS[:30], "--prompts": PATHS,
        "--from": PATHS, "--adaptor": PATHS, "--lora": PATHS, "--steps": NUMBERS,
    },
    "demo": {"--out": PATHS, "--task": ["edit", "x"]},
}  # fmt: skip
BUNDLES = ["emoji", "emoji", "emoji", *PATHS]

# Examples that once were tracebacks, hangs or without bounds.
KEPT = [
    ("generate", "emoji", "a", "--count", str(10**9)),
    ("generate", "emoji", "a", "--seed", str(10**30)),
    ("generate", "emoji", "a", "--out", "loop"),
    ("generate", "emoji", "a", "--out", "x" * 300),
    ("generate", "emoji", "\udcff"),
    ("generate", "emoji", "(" * 5000),
    ("generate", "emoji", "(a:1.5) " + "b " * 200),
    ("generate", "emoji", "x" * 120_000),
    ("generate", "loop", "a"),
    ("generate", "/dev/zero", "a"),
    ("inpaint", "emoji", "fifo", "fifo", "a"),
    ("profile", "emoji", "--runs", str(10**9)),
    ("profile", "compare", "/dev/zero", "fifo"),
    ("profile", "table", "sparse"),
    ("build", "emoji", "--backend", "rtx", "--workspace", str(10**12)),
    ("evaluate", "--images", str(10**9)),
    ("export", "--model", "emoji", "--out", "new", "--prompts", "/dev/zero"),
    ("export", "--model", "emoji", "--out", "new", "--prompts", "fifo"),
    ("export", "--model", "emoji", "--out", "new", "--dynamic", f"batch=1:1:{'9' * 5000}"),
    ("train", "--out", "new", "--recipe", "/dev/zero"),
    ("train", "--out", "new", "--recipe", "fifo"),
    ("export", "--model", "fifo", "--out", "new"),
]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "place")


def fill(folder: Path) -> Path:
    """Make the folder in which a command runs, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "folder").mkdir(parents=True)
    (folder / "folder/file.txt").write_text("mine\n")
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("a boat\na bridge\n")
    (folder / "image.png").write_bytes(b"mine")
    (folder / "report.json").write_text("[" * 100_000)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    with (folder / "sparse").open("wb") as file:
        file.truncate(40 * 10**9)
    Image.new("RGB", (70, 65), "red").save(folder / "photo.png")
    return folder


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, ...]:
    """A command that runs whole, with up to four options."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments, options = COMMANDS[command]
    kinds = {
        "bundle": st.sampled_from(BUNDLES),
        "text": st.sampled_from(TEXTS) | st.text(max_size=30),
        "image": st.sampled_from(["photo.png", *PATHS]),
        "path": st.sampled_from(PATHS),
    }
    words = [draw(kinds[kind]) for kind in arguments]
    if command == "build" and draw(st.integers(0, 9)):
        words += ["--backend", "rtx", "--target", "rtx40", "--dry-run"]
    if command == "profile":  # fifty runs are honest work of half a minute on a busy machine
        words += ["--runs", "1", "--warmup", "0"]
    return (*command.split(), *words, *_options(draw, options))


@st.composite
def checked_lines(draw: st.DrawFn) -> tuple[str, ...]:
    """A command of which only the checks run, with up to five options."""
    command = draw(st.sampled_from(sorted(CHECKED)))
    words = {"export": ["--model", "emoji", "--out", "new"], "train": ["--out", "new"]}
    return (command, *words.get(command, []), *_options(draw, CHECKED[command]))


def _options(draw: st.DrawFn, options: dict[str, list[str]]) -> list[str]:
    words = []
    names = sorted(options)
    for name in draw(st.lists(st.sampled_from(names), max_size=5)) if names else []:
        words.append(name)
        if options[name]:
            words.append(draw(st.sampled_from(options[name])))
    return words


@contextmanager
def read_by_somebody(pipe: Path) -> Iterator[None]:
    """What is written into a pipe is read meanwhile: an output may be one, and writing it waits."""
    ended = threading.Event()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def read() -> None:
        while not ended.wait(0.01):
            with suppress(BlockingIOError):
                os.read(reader, 1 << 20)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.close(reader)


def check(worker: Worker, folder: Path, words: tuple[str, ...], *, only_checks: bool) -> None:
    fill(folder)
    with read_by_somebody(folder / "fifo"):
        outcome = worker.run(folder, words, forbidden=HEAVY if only_checks else ())
    if only_checks and outcome.code == 96:  # the checks let it pass
        return
    assert outcome.fault is None, words
    # What was there is there.
    assert (folder / "file.txt").read_text() == "a boat\na bridge\n"
    assert (folder / "folder/file.txt").read_text() == "mine\n"
    if "--force" not in words:
        assert (folder / "image.png").read_bytes() == b"mine"


@pytest.mark.parametrize("words", KEPT, ids=lambda words: " ".join(words)[:60])
def test_kept_examples(words: tuple[str, ...], worker: Worker, folder: Path) -> None:
    outcome = worker.run(folder, words, forbidden=HEAVY)
    assert outcome.fault is None
    assert outcome.code == 1, "it was accepted"


@pytest.mark.parametrize("only_checks", [False, True], ids=["whole", "checks"])
def test_command_lines(only_checks: bool, worker: Worker, tmp_path: Path) -> None:
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize="HIPA_FUZZ_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(words=checked_lines() if only_checks else command_lines())
    def run(words: tuple[str, ...]) -> None:
        # An argument of a process has no zero byte.
        words = tuple(word.replace("\0", "") for word in words)
        check(worker, tmp_path / "place", words, only_checks=only_checks)

    run()
