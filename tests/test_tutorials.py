"""The tutorials that can be followed literally: their commands run in order, as written.

A page's bash and py blocks run in an empty folder that has the repository's examples, but those
after a comment 'not run by the tests'. A block of another language is a file where the paragraph
before it says 'Save … as `NAME`'.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs/tutorials"
NOT_RUN = "<!-- not run by the tests"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"\bSave [^.`]*\bas `([\w./-]+)`")


@dataclass(frozen=True)
class Step:
    """A block of a page: its language, its text, and the name of the file that it is, if any."""

    language: str
    text: str
    name: str | None
    run: bool


def steps(page: str) -> list[Step]:
    """The blocks of a page, in order."""
    text = (TUTORIALS / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip("\n").rpartition("\n\n")[2]
        saved = SAVED.search(" ".join(before.split()))
        run = NOT_RUN not in before
        found.append(Step(match[1], match[2], saved[1] if saved else None, run))
    return found


def follow(page: str, folder: Path) -> str:
    """Do what a page says; everything that the commands print."""
    tools = folder.parent / "tools"
    tools.mkdir()
    # An environment that borrows packages has no script for accelerate of its own.
    (tools / "accelerate").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"\n'
    )
    (tools / "accelerate").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(tools), os.environ["PATH"]]),
        "HIPA_CACHE": str(folder.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    printed = ""
    for step in steps(page):
        if step.name is not None:
            (folder / step.name).write_text(step.text, encoding="utf-8")
        elif step.run and step.language in ("bash", "py"):
            command = ["bash", "-euo", "pipefail", "-c", step.text]
            if step.language == "py":
                command = [sys.executable, "-c", step.text]
            result = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{step.text}\n{result.stdout}\n{result.stderr}"
            printed += result.stdout + result.stderr
    return printed


def pixels(path: Path) -> np.ndarray:
    """An image of the embedded model's size that is not blank."""
    with Image.open(path) as image:
        assert image.size == (64, 64)
        values = np.asarray(image.convert("RGB")).astype(float)
    assert values.std() > 10
    return values


def test_what_is_not_run_needs_what_a_test_has_not() -> None:
    """Every other command of the three pages runs below."""
    for page, left_out in (
        ("fine-tune-on-orin.md", ["pip install", "rsync", "hipa-build"]),
        ("four-gpus.md", ["pip install", "hipa-train --recipe sd15", "accelerate launch"]),
        ("publish-a-model.md", ["pip install", "hf auth login"]),
    ):
        skipped = [step.text for step in steps(page) if not step.run]
        assert len(skipped) == len(left_out)
        for text, start in zip(skipped, left_out, strict=True):
            assert text.startswith(start)


@pytest.mark.slow
def test_my_fine_tune_on_an_orin(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    printed = follow("fine-tune-on-orin.md", folder)
    pixels(folder / "first.png")

    manifest = json.loads((folder / "my-bundle/hipa.json").read_text())
    assert manifest["precision"] == "fp16"
    assert manifest["decoder"]["kind"] == "tiny"
    assert [lora["name"] for lora in manifest["loras"]] == ["my-style"]

    # What the page shows of the command's words is what the command says.
    shown = next(step.text for step in steps("fine-tune-on-orin.md") if step.language == "text")
    for line in shown.splitlines():
        assert line in printed
    assert "next: hipa-build my-bundle --for orin-nano --dry-run" in printed


@pytest.mark.slow
def test_an_adaptor_on_several_gpus(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    follow("four-gpus.md", folder)
    adaptor = json.loads((folder / "my-adaptor/hipa_adaptor.json").read_text())
    assert adaptor["steps_trained"] == 3
    assert (folder / "my-adaptor/pytorch_lora_weights.safetensors").is_file()
    assert list((folder / "my-adaptor.run").rglob("*"))


@pytest.mark.slow
def test_from_an_adaptor_to_a_published_model(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    follow("publish-a-model.md", folder)
    card = (folder / "folder/README.md").read_text()
    assert "HiPA, one step" in card
    assert (folder / "folder/quality/samples.png").is_file()
    in_diffusers = pixels(folder / "diffusers.png")
    in_peft = pixels(folder / "peft.png")
    assert abs(in_diffusers - in_peft).max() <= 2
