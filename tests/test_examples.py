"""Every script of examples/ runs, in an empty folder, and makes what its docstring says."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The caches in a folder of the test's own: teacher images of a training are kept there."""
    return {**os.environ, "HIPA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "current"
    path.mkdir()
    return path


def run(name: str, folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """The last line that a script prints."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def picture(source: Path | BytesIO, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """The pixels of an image that is neither blank nor noise."""
    with Image.open(source) as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB")).astype(float)
    neighbours = abs(np.diff(pixels, axis=0)).mean()
    assert pixels.std() > 30
    assert neighbours < pixels.std() / 2
    return pixels


def test_01_an_image(folder: Path, environment: dict[str, str]) -> None:
    assert run("01_image.py", folder, environment) == "apple.png: 128x128, seed 0, on onnxruntime"
    red, green, _ = picture(folder / "apple.png")[40:88, 40:88].mean(axis=(0, 1))
    assert red > green + 50


def test_02_many_images(folder: Path, environment: dict[str, str]) -> None:
    assert run("02_many_images.py", folder, environment) == "images: 12 images"
    expected = []
    for prompt in range(3):
        for seed in range(100, 104):
            expected.append(f"{prompt}-seed{seed}.png")
    assert sorted(path.name for path in (folder / "images").iterdir()) == expected
    for name in expected:
        picture(folder / "images" / name)


def test_03_a_web_server(folder: Path, environment: dict[str, str]) -> None:
    server = subprocess.Popen(
        [sys.executable, EXAMPLES / "03_web_server.py", "--port", "0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = server.stdout.readline().strip().removeprefix("serving on ")
        query = "/?prompt=3d+emoji+of+a+red+apple&seed=1"
        with urllib.request.urlopen(address + query, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/png"
            picture(BytesIO(answer.read()))

        def ask(seed: int) -> bytes:
            url = f"{address}/?prompt=3d+emoji+of+a+red+apple&seed={seed}"
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read()

        with ThreadPoolExecutor(4) as pool:
            at_once = list(pool.map(ask, [0, 1] * 4))
        assert at_once == [ask(0), ask(1)] * 4
        for wrong in ("/", "/?prompt=apple&seed=much", "/?prompt=apple&seed=-1"):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(address + wrong, timeout=60)
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.thorough
@pytest.mark.slow
def test_04_from_an_image(
    folder: Path, environment: dict[str, str], emoji_task_bundle: Callable[[str], Path]
) -> None:
    """The script exports one of its bundles, and finds the others as a run before left them."""
    for task in ("inpaint", "upscale"):
        shutil.copytree(emoji_task_bundle(task), folder / "bundles" / task)
    line = run("04_from_an_image.py", folder, environment)
    assert line == "edited.png, inpainted.png, upscaled.png (128x128)"
    source = picture(folder / "source.png")
    edited = picture(folder / "edited.png")
    inpainted = picture(folder / "inpainted.png")
    upscaled = picture(folder / "upscaled.png")
    assert abs(edited - source).mean() > 5
    assert (inpainted[:, :20] == source[:, :20]).all()
    assert (inpainted[32:96, 64:112] != source[32:96, 64:112]).any()
    assert abs(upscaled - source).mean() < 20


@pytest.mark.thorough
@pytest.mark.slow
def test_05_train_an_adaptor(folder: Path, environment: dict[str, str]) -> None:
    line = run("05_train_adaptor.py", folder, environment, "--steps", "1", "--pairs", "4")
    assert line == "trained.png, with an adaptor trained for 1 steps"
    picture(folder / "trained.png")
    assert (folder / "my-adaptor/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.thorough
@pytest.mark.slow
def test_06_swap_adaptors(folder: Path, environment: dict[str, str]) -> None:
    line = run("06_swap_adaptors.py", folder, environment)
    found = re.fullmatch(
        r"mean difference of the two adaptors: (.+) of 255; own one restored: True", line
    )
    assert found
    assert float(found[1]) > 1
    own = picture(folder / "own.png")
    assert (picture(folder / "own-again.png") == own).all()
    assert (picture(folder / "other.png") != own).any()


@pytest.mark.thorough
@pytest.mark.slow
def test_07_compare_latency(folder: Path, environment: dict[str, str]) -> None:
    # Which one is faster is not asserted: other work on the machine may decide that.
    line = run("07_compare_latency.py", folder, environment, "--runs", "10")
    assert re.fullmatch(
        r"tiny decoder: [\d.]+ times the full decoder's time, (slower|faster|same)", line
    )
    assert (folder / "full.json").is_file()
    assert (folder / "tiny.json").is_file()


def test_08_reproduce_an_image(folder: Path, environment: dict[str, str]) -> None:
    assert run("08_reproduce_image.py", folder, environment) == "the same bytes: True"
    assert run("08_reproduce_image.py", folder, environment, "panda.png") == "the same bytes: True"
    picture(folder / "panda.png")


def test_every_example_is_run_and_listed() -> None:
    tests = Path(__file__).read_text()
    table = (EXAMPLES / "README.md").read_text()
    for script in SCRIPTS:
        assert f'"{script.name}"' in tests
        assert f"[{script.name}]({script.name})" in table


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_says_what_it_needs_how_to_run_it_and_what_to_expect(script: Path) -> None:
    text = script.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    for part in ("Needs:", "Run:", "Expect:", f"python examples/{script.name}"):
        assert part in docstring
    assert len(text.splitlines()) <= 60
