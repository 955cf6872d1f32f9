"""A demo's folder is begun, continued, and never mixed with something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from hipa_deploy.demo.steps import (
    MARKER,
    alone_in,
    begun_folder,
    choose_folder,
    open_folder,
    print_summary,
)
from hipa_deploy.errors import HipaError


def test_a_folder_is_begun_and_continued(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    open_folder(out, {"model": "m", "task": "edit"})
    open_folder(out, {"task": "edit", "model": "m"})
    assert [path.name for path in out.iterdir()] == [MARKER]


def test_a_demo_with_other_options_is_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    open_folder(out, {"model": "m", "task": "edit"})
    with pytest.raises(HipaError, match="with other options"):
        open_folder(out, {"model": "m", "task": "inpaint"})


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(HipaError, match="demo is no folder"):
        open_folder(tmp_path / "demo", {})


@pytest.mark.parametrize(
    ("engines", "trained_with", "expected"),
    [
        ([], None, ["pip install 'hipa-deploy[rtx]'", "machine: export, ONNX Runtime (CPU); 1.5"]),
        ([Path("a")], "PyTorch, CPU", ["1 TensorRT-RTX", "machine: training (PyTorch, CPU), "]),
    ],
)
def test_the_summary_says_what_ran_here(
    engines: list[Path], trained_with: str | None, expected: list[str], console: Console
) -> None:
    columns = ["before", "after"]
    print_summary(Path("demo"), columns, engines, ["result: 1"], trained_with, 90.0, console)
    text = console.export_text()
    for part in ("contact_sheet.png (before | after)", "result: 1", *expected):
        assert part in text


def test_without_a_name_the_first_folder_that_fits_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    apple = {"task": "edit"}
    assert choose_folder(apple) == Path("demo")
    open_folder(Path("demo"), apple)
    assert choose_folder(apple) == Path("demo")  # continued
    assert choose_folder({"task": "inpaint"}) == Path("demo-2")
    Path("demo-2").mkdir()
    (tmp_path / "demo-2" / "photo").touch()
    assert choose_folder({"task": "inpaint"}) == Path("demo-3")


def test_a_demo_that_was_begun_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it trains: the pace of another day may choose another length."""
    monkeypatch.chdir(tmp_path)
    demos = [{"steps": 500}, {"steps": 300}]
    assert begun_folder(None, demos) is None
    open_folder(Path("demo"), {"task": "edit"})
    open_folder(Path("demo-2"), demos[1])
    assert begun_folder(None, demos) == (Path("demo-2"), 1)
    assert begun_folder(Path("demo-2"), demos) == (Path("demo-2"), 1)
    assert begun_folder(Path("new"), demos) is None
    with pytest.raises(HipaError, match="another model or with other options"):
        begun_folder(Path("demo"), demos)


def test_two_demos_in_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(HipaError, match=r"demo folder .* is writing here"):
        alone_in(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
