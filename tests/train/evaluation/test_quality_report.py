import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hipa_deploy.embedded import ADAPTOR, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA
from hipa_deploy.train.evaluation.evaluation_request import (
    choose_teacher,
    draw,
    held_out_prompts,
    recorded_teacher,
    reference_teacher,
    trained_on,
)
from hipa_deploy.train.evaluation.quality import Quality, compare
from hipa_deploy.train.evaluation.quality_report import (
    ADAPTED,
    BASE,
    QualityReport,
    _intervals,
    _Measured,
    gap_line,
    make_images,
    quality_report,
    render_table,
    teacher_row,
    write_report,
)
from hipa_deploy.train.recipes.recipe import TeacherSettings, load_recipe, read_prompts
from tests.tiny_model import PROMPTS

TEACHER = TeacherSettings(steps=25, guidance=5.0, pairs=1)


def test_draw_goes_through_the_prompts_in_turn() -> None:
    texts, seeds = draw(["a", "b", "c"], 5)
    assert texts == ["a", "b", "c", "a", "b"]
    assert len(set(seeds)) == 5


@pytest.mark.parametrize("count", [0, -1, 3, 10**9])
def test_absurd_counts(count: int) -> None:
    with pytest.raises(HipaError, match=rf"number of images: {count}\. Expected 4 to 100000\."):
        draw(["a", "b"], count)


def test_held_out_prompts_come_from_the_model_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts_pair.txt").write_text("a red apple\n\na pear\n")
    (tmp_path / "mine.txt").write_text("a boat\n")
    assert held_out_prompts(tmp_path) == ["a red apple", "a pear"]
    assert held_out_prompts(tmp_path, tmp_path / "mine.txt") == ["a boat"]


def test_one_prompt_alone_cannot_be_evaluated() -> None:
    with pytest.raises(
        HipaError, match=r"different prompts to evaluate on: 1\. Expected at least 2\."
    ):
        draw(["a", "a"], 8)


@pytest.mark.parametrize("content", [None, "\n \n"])
def test_no_prompts(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_text(content)
    with pytest.raises(HipaError, match=r"p\.txt"):
        held_out_prompts(tmp_path, tmp_path / "p.txt")


TEXTS = [f"prompt {n}" for n in range(8)]


def image_sets() -> list[np.ndarray]:
    """Truth, truth from other noise, close to the truth, far from it: uint8 [8, 64, 64, 3] each."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 255, (8, 1, 1, 3)) + generator.integers(0, 60, (8, 64, 64, 3))
    near = truth + generator.integers(0, 4, truth.shape)
    far = generator.integers(0, 255, truth.shape)
    again = truth[:, ::-1] + generator.integers(0, 4, truth.shape)
    return [np.clip(array, 0, 255).astype(np.uint8) for array in (truth, again, near, far)]


def test_a_better_set_has_better_numbers(tmp_path: Path) -> None:
    truth, again, near, far = image_sets()
    report = quality_report(
        TEACHER, TEXTS, truth, again, {"truth": truth, ADAPTED: near, BASE: far}
    )
    assert report.rows[ADAPTED].kid_lite0 < report.rows[BASE].kid_lite0
    assert report.kid_lite0_floor == report.rows["truth"].kid_lite0
    assert report.rows[ADAPTED].distance < report.rows[BASE].distance
    assert report.rows[ADAPTED].high_frequency_ratio == pytest.approx(1, abs=0.2)
    assert (report.kid_gap_closed("truth"), report.kid_gap_closed(BASE)) == (1, 0)
    assert 0.8 < report.kid_gap_closed() < 1.2
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    console.print(render_table(report))
    assert "other noise" in console.export_text()


def test_every_number_has_an_interval_that_holds_it() -> None:
    truth, again, near, far = image_sets()
    report = quality_report(
        TEACHER, TEXTS, truth, again, {teacher_row(25): truth, ADAPTED: near, BASE: far}
    )
    for name, row in report.rows.items():
        intervals = report.intervals[name]
        for number in ("kid_lite0", "distance", "high_frequency_ratio"):
            low, high = getattr(intervals, number)
            assert low <= high
            assert low - 1e-9 <= getattr(row, number) <= high + 1e-9 or number == "kid_lite0"
    assert report.intervals[ADAPTED].kid_gap_closed is not None
    assert gap_line(report).startswith("KID gap closed: HiPA, one step ")
    assert any("8 different prompts are few" in text for text in report.doubts)


def test_no_share_of_a_gap_that_is_smaller_than_its_noise() -> None:
    truth, again, near, _ = image_sets()
    report = quality_report(TEACHER, TEXTS, truth, again, {ADAPTED: near, BASE: truth})
    assert report.intervals[ADAPTED].kid_gap_closed is None
    assert gap_line(report) is None
    assert any("smaller than its own noise" in text.replace("\n", " ") for text in report.doubts)


@pytest.mark.parametrize(("spread", "given"), [(0.01, True), (0.2, False)])
def test_no_share_whose_interval_is_wider_than_the_gap(spread: float, given: bool) -> None:
    generator = np.random.default_rng(0)

    def row(kid: float, noise: float) -> _Measured:
        draws = kid + noise * generator.standard_normal(1000)
        return _Measured(Quality(kid, None, 1.0), draws, None, np.ones(1000))

    # The gap is 0.1 and clear of 0: whether a share of it is given depends on the row's own noise.
    measured = _intervals(row(0.02, spread), row(0.1, 0.005), row(0.0, 0.005))
    assert (measured.kid_gap_closed is not None) == given

    truth, again, near, far = image_sets()
    report = quality_report(TEACHER, TEXTS, truth, again, {ADAPTED: near, BASE: far, "rival": near})
    intervals = {**report.intervals, "rival": measured}
    report = report.model_copy(update={"intervals": intervals})
    assert ("rival" in gap_line(report)) == given
    assert any("is given of rival:" in text for text in report.doubts) != given


def test_a_rival_that_is_called_teacher_has_a_share_too() -> None:
    truth, again, near, far = image_sets()
    rival = "teacher-of-mine (images)"
    rows = {teacher_row(1): far, teacher_row(25): truth, ADAPTED: near, BASE: far, rival: near}
    report = quality_report(TEACHER, TEXTS, truth, again, rows)
    assert f"; {rival} " in gap_line(report)
    assert "teacher, " not in gap_line(report)
    unknown = report.intervals[rival].model_copy(update={"kid_gap_closed": None})
    report = report.model_copy(update={"intervals": {**report.intervals, rival: unknown}})
    assert any(f"is given of {rival}:" in text for text in report.doubts)


def test_the_numbers_are_those_of_the_single_functions() -> None:
    truth, again, near, far = image_sets()
    report = quality_report(TEACHER, TEXTS, truth, again, {ADAPTED: near, BASE: far})
    expected = compare(near, truth, again, TEXTS)
    row = report.rows[ADAPTED]
    assert row.kid_lite0 == pytest.approx(expected.kid_lite0, rel=1e-9)
    assert row.distance == pytest.approx(expected.distance, rel=1e-5)
    assert row.high_frequency_ratio == pytest.approx(expected.high_frequency_ratio, rel=1e-5)


def test_a_report_of_version_3_is_read() -> None:
    truth, again, near, far = image_sets()
    values = quality_report(TEACHER, TEXTS, truth, again, {ADAPTED: near, BASE: far}).model_dump()
    for name in ("intervals", "prompts", "teacher_from"):
        del values[name]
    old = QualityReport.model_validate(values | {"schema_version": 3})
    assert old.doubts == []
    assert "KID gap closed: HiPA, one step " in gap_line(old)


def test_the_report_is_a_folder_of_text_and_pictures(tmp_path: Path) -> None:
    truth, again, near, far = image_sets()
    rows = {"teacher, 4 steps": near, teacher_row(25): truth, BASE: far, ADAPTED: near}
    path = write_report(
        tmp_path / "report", quality_report(TEACHER, TEXTS, truth, again, rows), rows
    )
    text = path.read_text()
    assert "KID gap closed: " in text
    assert all(f"| {name} |" in text for name in rows)
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 3
    assert all(Image.open(path.parent / name).size[0] > 200 for name in pictures)
    assert json.loads((path.parent / "report.json").read_text())["teacher_steps"] == 25


def test_the_teacher_is_the_adaptors_own() -> None:
    own = choose_teacher(None, ADAPTOR, "some-model")
    assert own.source == "the adaptor's own record"
    assert own.teacher.guidance == recorded_teacher(ADAPTOR).guidance
    asked = choose_teacher("sd15", ADAPTOR, "some-model")
    assert asked.source == "the recipe sd15"
    assert asked.teacher.guidance == 7.5
    assert "guidance 7.5 rather than" in asked.differs
    assert choose_teacher(None, None, "emoji").source.startswith("the recipe emoji")
    assert choose_teacher(None, None, "some-model").teacher.guidance == 7.5


def test_an_adaptor_whose_record_says_no_teacher(tmp_path: Path) -> None:
    assert recorded_teacher(tmp_path) is None
    values = json.loads((ADAPTOR / METADATA).read_text())
    values["recipe"] = {"teacher": {"another": "version"}}
    (tmp_path / METADATA).write_text(json.dumps(values))
    for name in ("pytorch_lora_weights.safetensors",):
        (tmp_path / name).symlink_to(ADAPTOR / name)
    assert recorded_teacher(tmp_path) is None


def test_prompts_of_the_training_are_recognised() -> None:
    prompts = read_prompts(load_recipe("emoji"), MODEL)
    assert trained_on(ADAPTOR, [*prompts, prompts[0]])
    assert not trained_on(ADAPTOR, prompts[1:])


def test_the_reference_is_fine_however_coarse_the_pairs_were() -> None:
    coarse = TeacherSettings(
        sampler="dpmsolver++", steps=8, guidance=2.0, pairs=1, mixed_precision="bf16"
    )
    assert reference_teacher(coarse) == TeacherSettings(
        sampler="ddim", steps=25, guidance=2.0, pairs=1
    )
    assert reference_teacher(coarse.model_copy(update={"steps": 50})).steps == 50


def test_images_of_every_row(model_dir: Path) -> None:
    teacher = TeacherSettings(steps=3, guidance=2.0, pairs=1)
    rows, again = make_images(model_dir, None, PROMPTS, teacher, 4, Console(file=io.StringIO()))
    assert list(rows) == ["teacher, 1 step", "teacher, 2 steps", "teacher, 3 steps", BASE]
    assert {images.shape for images in (*rows.values(), again)} == {(4, 32, 32, 3)}
    assert not np.array_equal(rows["teacher, 3 steps"], again)
