"""One pipeline in eight threads: every image is right, and its parameters name what made it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import FOLDER, AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompts import CACHED_PROMPTS, EncodedPrompts
from hipa_deploy.generate.stages import HostStages
from tests.swap_samples import INFO, scaled_weights, write_swap
from tests.threads import THREADS, in_threads

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "pink", "brown")
PROMPTS = [f"3d emoji of a {colour} apple" for colour in COLOURS]
CALLS = 6  # of each thread
LEVELS = {"half": 1, "double": 2}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_thread_gets_its_own_image(backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    with OneStepPipeline.load("emoji", backend=backend) as pipe:
        alone = [pipe(prompt, seed=seed).images_BHWC for seed, prompt in enumerate(PROMPTS)]

        def make(number: int) -> list[np.ndarray]:
            return [pipe(PROMPTS[number], seed=number).images_BHWC for _ in range(CALLS)]

        for expected, got in zip(alone, in_threads(make), strict=True):
            for images in got:
                np.testing.assert_array_equal(images, expected)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The embedded bundle with two adaptors to swap in, 'half' and 'double'."""
    bundle = Bundle.open(Path(shutil.copytree(BUNDLE, tmp_path / "bundle")))
    for name, factor in (("half", 0.5), ("double", 2.0)):
        info = INFO.model_copy(update={"sha256": name})
        weights = scaled_weights(bundle, factor)
        write_swap(bundle, bundle.root / FOLDER / name, weights, adaptor=info)
    return bundle.root


def test_an_image_names_the_adaptor_that_made_it(root: Path) -> None:
    with OneStepPipeline.load(root, backend="onnxruntime") as pipe:
        expected = {}
        for name in ("half", "double", None):
            pipe.swap_adaptor(name)
            result = pipe(PROMPTS[0])
            expected[result.parameters[0]["adaptor"]] = result.images_BHWC
        assert len(expected) == 3

        done = threading.Event()

        def swap_or_make(number: int) -> None:
            if number == 0:
                for name in ("half", "double", None):
                    pipe.swap_adaptor(name)
                done.set()
            while not done.is_set():
                result = pipe(PROMPTS[0])
                adaptor = result.parameters[0]["adaptor"]
                np.testing.assert_array_equal(result.images_BHWC, expected[adaptor])

        in_threads(swap_or_make, threads=4)


class EngineInPlace:
    """A runner of an engine that changes in place: its image has the grey level of its weights."""

    spec = StageSpec(
        name="unet",
        inputs=(TensorSpec(name="noise", dtype="float32", shape=(1, 4, 16, 16)),),
        outputs=(
            TensorSpec(name="latents", dtype="float32", shape=(1, 4, 16, 16)),
            TensorSpec(name="images", dtype="uint8", shape=(1, 64, 64, 3)),
        ),
    )

    def __init__(self) -> None:
        self.level = 0
        self.calls = 0
        self.closed = False

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if self.closed:
            raise HipaError("the runner is closed")
        level = self.level
        time.sleep(0.001)  # other threads run meanwhile
        assert (self.level, self.closed) == (level, False), "changed under a call"
        self.calls += 1
        images_BHWC = np.full((1, 64, 64, 3), level, np.uint8)
        return {"latents": inputs["noise"], "images": images_BHWC}

    def refit(self, level: int) -> None:
        self.level = level
        time.sleep(0.001)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine_pipe(root: Path, monkeypatch: pytest.MonkeyPatch) -> OneStepPipeline:
    """A pipeline of one stage, which takes noise alone; the adaptors set its grey level."""

    def swap_stage(bundle, runner, backend, swap):
        runner.refit(LEVELS[swap.manifest.adaptor.sha256])
        return runner

    monkeypatch.setattr("hipa_deploy.generate.swap_stage.swap_stage", swap_stage)
    pipe = OneStepPipeline(
        Bundle.open(root), "tensorrt", HostStages("tensorrt", {"unet": EngineInPlace()})
    )
    monkeypatch.setattr(pipe._prompts, "feed", lambda prompts, encode: {})
    return pipe


def test_an_engine_does_not_change_under_a_call(
    engine_pipe: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps = {name: AdaptorSwap.open(engine_pipe.bundle, name) for name in LEVELS}
    monkeypatch.setattr(AdaptorSwap, "open", lambda bundle, name, **_: swaps[name])
    engine_pipe.swap_adaptor("half")
    done = threading.Event()

    def swap_or_make(number: int) -> None:
        if number == 0:
            for _ in range(20):
                engine_pipe.swap_adaptor("double")
                engine_pipe.swap_adaptor("half")
            done.set()
        while not done.is_set():
            result = engine_pipe(PROMPTS[0])
            level = int(result.images_BHWC[0, 0, 0, 0])
            assert LEVELS[result.parameters[0]["adaptor"]] == level

    in_threads(swap_or_make)


def test_closing_waits_for_the_image_under_way(engine_pipe: OneStepPipeline) -> None:
    runner = engine_pipe.runners["unet"]

    def make_until_closed(number: int) -> str:
        while runner.calls < 1000:
            if number == 0 and runner.calls > 20:
                engine_pipe.close()
            try:
                engine_pipe(PROMPTS[0])
            except HipaError as error:
                return str(error)
        return "it was never closed"

    assert set(in_threads(make_until_closed)) == {"the pipeline is closed. Load the bundle again."}


def no_encoder(tokens_BL: np.ndarray) -> np.ndarray:
    raise AssertionError("the text encoder ran")


class NumberedTokenizer:
    """A tokenizer of prompts that are numbers."""

    def __call__(self, prompts, *, truncate: bool) -> np.ndarray:
        return np.asarray([[int(prompt)] for prompt in prompts])


def test_contexts_are_remembered_and_forgotten_by_several_threads() -> None:
    cache = EncodedPrompts(NumberedTokenizer())  # type: ignore[arg-type]

    def fill(number: int) -> None:
        for step in range(2000):
            value = number + THREADS * step
            prepared: list = cache.prepare([str(value)], truncate=False)
            cache.keep(prepared, {"context": np.full(1, value)})
            known = cache.feed(prepared, no_encoder)
            # Another thread may have filled the cache meanwhile.
            assert known.get("context", value) == value

    in_threads(fill)
    assert len(cache._cache) == CACHED_PROMPTS


# In a process of its own: that of the tests has threads, and a fork of it is warned of.
FORK = """
import os
import signal
from hipa_deploy import HipaError, OneStepPipeline

pipe = OneStepPipeline.load("emoji", backend="onnxruntime", cache=False)
if os.fork() == 0:
    signal.alarm(60)  # a fork that waits for ever ends
    for call in (lambda: pipe("a cat"), lambda: pipe.swap_adaptor(None), pipe.warmup):
        try:
            call()
        except HipaError as error:
            print(error, flush=True)
    pipe.close()
    print("closed", flush=True)
    os._exit(0)
status = os.wait()[1]
print("status", status, pipe("a cat").seeds)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_does_not_use_the_pipeline_of_its_parent() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *refused, closed, status = done.stdout.splitlines()
    assert len(refused) == 3
    assert all("Load the bundle in each process" in line for line in refused)
    assert closed == "closed"
    assert status == "status 0 (0,)"
