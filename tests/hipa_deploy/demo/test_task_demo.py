"""The demos of the tasks, on few images; building engines is tested with the training demo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.demo import contact_sheet, steps, task_demo
from hipa_deploy.demo.contact_sheet import HEADING_HEIGHT, PROMPT_WIDTH
from hipa_deploy.demo.steps import open_folder
from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import unet_sha256
from hipa_deploy.tasks import Task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "columns"),
    [
        pytest.param("edit", 3, marks=pytest.mark.thorough),
        pytest.param("inpaint", 4, marks=pytest.mark.thorough),
        ("upscale", 4),
    ],
)
def test_a_demo_of_each_task(
    task: Task,
    columns: int,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    emoji_task_bundle: Callable[[str], Path],
) -> None:
    """The first exports its bundle itself; the others continue a demo that was stopped after it."""
    monkeypatch.setattr(task_demo, "build", lambda bundle, console: [])
    for module in (contact_sheet, task_demo):
        monkeypatch.setattr(module, "SHEET_ROWS", 2)
    monkeypatch.setattr(steps, "LATENCY_RUNS", 5)
    monkeypatch.setattr(steps, "LATENCY_SECONDS", 0.0)
    out = tmp_path / "demo"
    if task != "edit":
        open_folder(out, {"model": unet_sha256(MODEL), "task": task})
        shutil.copytree(emoji_task_bundle(task), out / "bundle")
    task_demo.run_task_demo(task, out, console=console)
    bundle = Bundle.open(out / "bundle")
    bundle.verify()
    assert bundle.manifest.task == task
    assert bundle.manifest.adaptor is not None
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (PROMPT_WIDTH + columns * 258, HEADING_HEIGHT + 2 * 258)
    assert json.loads((out / "latency.json").read_text())["end_to_end"]["p50_ms"] > 0
    assert "contact sheet" in console.export_text()


def test_a_demo_of_another_task_is_not_mixed(tmp_path: Path, console: Console) -> None:
    out = tmp_path / "demo"
    open_folder(out, {"model": "m", "task": "edit"})
    with pytest.raises(HipaError, match="with other options"):
        task_demo.run_task_demo("inpaint", out, console=console)
