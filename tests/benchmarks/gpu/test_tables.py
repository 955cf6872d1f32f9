"""The tables of the documentation are those of the data files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu.figures import PartResult, Report, find_conditions, read_figures
from benchmarks.gpu.tables import BLOCK, DATA, body, render, updated
from hipa_deploy.engines.latency.validity import judge
from hipa_deploy.errors import HipaError
from tests.benchmarks.gpu.test_figures import a_figure

DOCS = Path(__file__).parents[3] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = sorted(DATA.glob("*.json"))
# What the documentation says as long as no data file is of a GPU.
NOT_RUN = "**Nothing has run on a GPU yet**"


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_a_page_has_the_tables_of_its_data_files(page):
    """After a change run ``python -m benchmarks.gpu.tables --write``."""
    text = page.read_text(encoding="utf-8")
    assert updated(text) == text
    # A mark without its end would never be filled.
    assert len(re.findall("<!-- figures: ", text)) == len(BLOCK.findall(text))


@pytest.mark.parametrize("file", FILES, ids=[path.name for path in FILES])
def test_a_data_file_is_shown_on_a_page(file):
    assert any(f"<!-- figures: {file.stem} -->" in page.read_text() for page in PAGES)


def test_the_documentation_says_whether_a_gpu_ran():
    of_a_gpu = [path for path in FILES if read_figures(path).conditions.note is None]
    measured = (DOCS / "explanation/measured.md").read_text()
    assert (NOT_RUN in measured) == (not of_a_gpu)


def a_report() -> Report:
    invalid = a_figure("one").model_copy(update={"facts": {"share_percent": 41.5}})
    long = judge([20.0] * 700, readings=None)
    valid = a_figure("two").model_copy(update={"validity": long, "engine": "a|b"})
    part = PartResult(
        part="rates",
        created="",
        seconds=1,
        budget_seconds=2,
        figures=(invalid, valid),
        left_out={"three": "the time budget ended first"},
    )
    return Report(conditions=find_conditions("a note"), parts={"rates": part})


def test_a_table_says_what_counts_and_why_not():
    text = body(a_report())
    lines = text.splitlines()
    assert lines[0] == "**a note**"
    assert (
        "| generate, rtx | sd15 | fp16 | 1 | 100 images/s | 10 | - | 41.5 | no (1) (2) |" in lines
    )
    assert "| generate, a\\|b | sd15 | fp16 | 1 | 100 images/s | 10 | 20 | - | yes |" in lines
    assert "- (1) 20 queries, and at least 100 are needed" in lines
    assert "- three: the time budget ended first" in lines
    assert "no NVIDIA GPU: none was tested" in render(a_report())


def test_a_table_that_departs_from_its_file_is_written_anew(tmp_path):
    (tmp_path / "h100.json").write_text(a_report().model_dump_json())
    page = "Text.\n<!-- figures: h100 -->\nan old table\n<!-- end of figures -->\nMore.\n"
    new = updated(page, tmp_path)
    assert "an old table" not in new
    assert "100 images/s" in new
    assert new.startswith("Text.\n")
    assert new.endswith("More.\n")
    assert updated(new, tmp_path) == new
    assert updated(new.replace("100 images/s", "200 images/s"), tmp_path) == new
    shutil.rmtree(tmp_path)
    with pytest.raises(HipaError, match=r"h100\.json"):
        updated(page, tmp_path)
