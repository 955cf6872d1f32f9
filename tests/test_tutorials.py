"""The tutorials that can be followed literally: their commands run in order, as written.

A page's bash and py blocks run in an empty folder that has the repository's examples, but those
after a comment 'not run by the tests'. A block of another language is a file where the paragraph
before it says 'Save … as `NAME`'.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.commands.app import main

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


@dataclass(frozen=True)
class Reader:
    """Someone who does what a page says, in a folder that looks like the repository.

    Commands of hipa-deploy run in this process: each import of torch would take seconds.
    """

    folder: Path
    capture: pytest.CaptureFixture[str]

    def follow(self, page: str) -> str:
        """Do what a page says; everything that the commands print."""
        printed = ""
        for step in steps(page):
            if step.name is not None:
                (self.folder / step.name).write_text(step.text, encoding="utf-8")
            elif step.run and step.language == "py":
                printed += self._run([sys.executable, "-c", step.text])
            elif step.run and step.language == "bash":
                for line in step.text.replace("\\\n", " ").splitlines():
                    printed += self._line(line)
        return printed

    def _line(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        if not words:
            return ""
        if not words[0].startswith("hipa-"):
            return self._run(["bash", "-euo", "pipefail", "-c", line])
        with pytest.raises(SystemExit) as ended:
            main([words[0].removeprefix("hipa-"), *words[1:]])
        printed = "".join(self.capture.readouterr())
        assert ended.value.code == 0, f"{line}\n{printed}"
        return printed

    def _run(self, command: list[str]) -> str:
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        printed = result.stdout + result.stderr
        assert result.returncode == 0, f"{command}\n{printed}"
        return printed


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Reader:
    tools = tmp_path / "tools"
    tools.mkdir()
    # An environment that borrows packages has no script for accelerate of its own.
    (tools / "accelerate").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"\n'
    )
    (tools / "accelerate").chmod(0o755)
    paths = [str(Path(sys.executable).parent), str(tools), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    return Reader(folder, capsys)


def pixels(path: Path) -> np.ndarray:
    """An image of the embedded model's size that is not blank."""
    with Image.open(path) as image:
        assert image.size == (128, 128)
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
def test_my_fine_tune_on_an_orin(reader: Reader) -> None:
    folder = reader.folder
    printed = reader.follow("fine-tune-on-orin.md")
    pixels(folder / "first.png")

    manifest = json.loads((folder / "orin-bundle/hipa.json").read_text())
    assert manifest["precision"] == "fp16"
    assert manifest["decoder"]["kind"] == "tiny"
    assert [lora["name"] for lora in manifest["loras"]] == ["my-style"]

    # What the page shows of the command's words is what the command says.
    shown = next(step.text for step in steps("fine-tune-on-orin.md") if step.language == "text")
    for line in shown.splitlines():
        assert line in printed
    assert "next: hipa-build orin-bundle --for orin-nano --dry-run" in printed


@pytest.mark.thorough
@pytest.mark.slow
def test_an_adaptor_on_several_gpus(reader: Reader) -> None:
    folder = reader.folder
    reader.follow("four-gpus.md")
    adaptor = json.loads((folder / "four-adaptor/hipa_adaptor.json").read_text())
    assert adaptor["steps_trained"] == 3
    assert (folder / "four-adaptor/pytorch_lora_weights.safetensors").is_file()
    assert list((folder / "four-adaptor.run").rglob("*"))


@pytest.mark.thorough
@pytest.mark.slow
def test_from_an_adaptor_to_a_published_model(reader: Reader) -> None:
    folder = reader.folder
    reader.follow("publish-a-model.md")
    card = (folder / "folder/README.md").read_text()
    assert "HiPA, one step" in card
    assert (folder / "folder/quality/samples.png").is_file()
    in_diffusers = pixels(folder / "diffusers.png")
    in_peft = pixels(folder / "peft.png")
    assert abs(in_diffusers - in_peft).max() <= 2
