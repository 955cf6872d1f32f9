"""Bundles, other adaptors and folders of images beside an adaptor in one report."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hipa_deploy.embedded import ADAPTOR, ADAPTORS, BUNDLE, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.image_file import encode_image
from hipa_deploy.models.style import Style
from hipa_deploy.train.evaluation import quality_report as quality_report_module
from hipa_deploy.train.evaluation.contenders import (
    BundleContender,
    ImageFolder,
    OtherAdaptor,
    check_contenders,
    parse_contender,
)
from hipa_deploy.train.evaluation.evaluation_request import FIRST_SEED
from hipa_deploy.train.evaluation.image_folder import find_images
from hipa_deploy.train.evaluation.quality_report import (
    QualityReport,
    make_images,
    quality_report,
    write_report,
)
from hipa_deploy.train.evaluation.rivals import check_rivals, contender_facts, rival_images
from hipa_deploy.train.recipes.recipe import TeacherSettings

APPLE = "3d emoji of a red apple"
PROMPTS = [APPLE, "3d emoji of a cat", "3d emoji of a boat", "3d emoji of a hat"]
SEEDS = [FIRST_SEED + number for number in range(4)]


def write_images(folder: Path, seeds: list[int] | None = None, count: int = 4) -> Path:
    """Flat images by number, which say their seeds if some are given."""
    folder.mkdir()
    for number in range(count):
        image = np.full((128, 128, 3), 40 * number, np.uint8)
        parameters = {}
        if seeds is not None:
            parameters = {"prompt": PROMPTS[number], "seed": seeds[number]}
        content = encode_image(image, parameters)
        (folder / f"{number:03d}.png").write_bytes(content)
    return folder


def test_what_a_name_stands_for(tmp_path: Path) -> None:
    assert parse_contender(str(BUNDLE)) == BundleContender(BUNDLE)
    assert parse_contender(str(ADAPTOR)) == OtherAdaptor(ADAPTOR)
    theirs = write_images(tmp_path / "theirs")
    assert parse_contender(str(theirs)) == ImageFolder(theirs)
    assert parse_contender("sd-turbo").row == "sd-turbo, one step"
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_model.safetensors").touch()
    assert parse_contender(f"{lora}=lcm-sd15@759").row == "lora (lcm-sd15@759), one step"
    for text in (str(lora), str(lora / "adapter_model.safetensors")):
        with pytest.raises(HipaError, match=r"Name its method too: --rival .*=lcm-sd15"):
            parse_contender(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HipaError, match=r"is no adaptor .*, no bundle .*, and has no images"):
        parse_contender(str(tmp_path / "empty"))


def test_a_contender_that_fails_does_so_before_the_teachers_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "theirs")
    Image.new("RGB", (64, 64)).save(folder / "003.png")

    def teacher_images(*_: object, **__: object) -> np.ndarray:
        pytest.fail("the teacher's images take minutes")

    monkeypatch.setattr(quality_report_module, "teacher_images", teacher_images)
    teacher = TeacherSettings(steps=25, pairs=1)
    with pytest.raises(HipaError, match=r"003.png has 64x64 pixels .* Expected 128x128"):
        make_images(
            MODEL, None, PROMPTS, teacher, 4, Console(quiet=True), rivals=[ImageFolder(folder)]
        )


def test_a_report_with_each_kind(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ADAPTOR, copy)
    theirs = write_images(tmp_path / "theirs")
    contenders = [parse_contender(str(folder)) for folder in (copy, BUNDLE, theirs)]
    check_contenders(contenders, MODEL)
    check_rivals(contenders, MODEL, Style())
    teacher = TeacherSettings(steps=2, guidance=2.0, pairs=1)
    quiet = Console(file=io.StringIO())
    rows, again = make_images(MODEL, ADAPTOR, PROMPTS, teacher, 4, quiet, rivals=contenders)
    facts = {one.row: contender_facts(one, MODEL, PROMPTS, SEEDS) for one in contenders}
    made = quality_report(teacher, PROMPTS, rows["teacher, 2 steps"], again, rows, facts)
    write_report(tmp_path / "report", made, rows)

    content = (tmp_path / "report/report.json").read_text()
    report = QualityReport.model_validate_json(content)
    assert report == made
    hipa = report.rows["HiPA, one step"]
    assert report.rows["copy (HiPA), one step"].distance == pytest.approx(hipa.distance)
    bundle = report.rows["bundle (bundle)"]
    assert bundle.distance == pytest.approx(hipa.distance, abs=0.01)
    assert bundle.kid_lite0 == pytest.approx(hipa.kid_lite0, rel=0.05)
    assert report.rows["theirs (images)"].distance is None
    assert json.loads(content)["rows"]["theirs (images)"]["distance"] is None
    assert report.notes["theirs (images)"][-1].endswith("no paired distance.")
    text = (tmp_path / "report/report.md").read_text()
    assert "theirs (images): Its images are found by their numbers." in text
    assert "bundle (bundle): It is run by the runtime, in fp16." in text
    assert "4 different prompts are few" in text


def test_a_bundles_images_are_the_runtimes() -> None:
    images = rival_images(MODEL, BundleContender(BUNDLE), PROMPTS[:2], SEEDS[:2])
    with OneStepPipeline.load(BUNDLE) as pipe:
        expected = pipe(PROMPTS[1], seed=SEEDS[1]).images_BHWC[0]
    assert np.abs(images[1].astype(int) - expected).max() <= 1


def test_images_that_say_the_rows_seeds_are_pairs(tmp_path: Path) -> None:
    same = find_images(write_images(tmp_path / "same", SEEDS), PROMPTS, SEEDS)
    assert same.same_noise
    other = find_images(write_images(tmp_path / "other", [1, 2, 3, 4]), PROMPTS, SEEDS)
    assert not other.same_noise
    assert "other seeds" in other.notes[1]
    with pytest.raises(HipaError, match="was made of the prompt '3d emoji of a red apple'"):
        find_images(tmp_path / "same", PROMPTS[::-1], SEEDS)


def test_images_by_their_captions(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "theirs", count=5)
    names = [3, 0, 2, 1, 4]
    rows = [f"{name:03d}.png,{PROMPTS[place % 4]}" for place, name in enumerate(names)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n")
    twice = [*PROMPTS, PROMPTS[0]]
    found = find_images(folder, twice, range(5))
    assert [path.stem for path in found.paths] == ["003", "000", "002", "001", "004"]
    with pytest.raises(HipaError, match="none is left for prompt 4, '3d emoji of a cat'"):
        find_images(folder, [*PROMPTS, PROMPTS[1]], range(5))


@pytest.mark.parametrize("name", ["{}.png.txt", "{}.png.caption", "{}.txt"])
def test_images_by_the_texts_beside_them(tmp_path: Path, name: str) -> None:
    folder = write_images(tmp_path / "theirs", count=4)
    # The first image has no caption, and the others show the prompts backwards.
    for number, prompt in zip([3, 2, 1], PROMPTS, strict=False):
        (folder / name.format(f"{number:03d}")).write_text(prompt)
    found = find_images(folder, PROMPTS[:3], range(3))
    assert [path.stem for path in found.paths] == ["003", "002", "001"]
    assert found.notes[0].startswith("Its images are found by their captions.")


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "theirs", count=3)
    with pytest.raises(HipaError, match=r"no image for 1 of 4 prompts, the first of them 3"):
        find_images(folder, PROMPTS, SEEDS)
    (folder / "3.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "3-seed7.png").write_bytes((folder / "000.png").read_bytes())
    with pytest.raises(HipaError, match="have one number"):
        find_images(folder, PROMPTS, SEEDS)
    (folder / "3-seed7.png").unlink()
    Image.fromarray(read_image(folder / "3.png")).resize((32, 48)).save(folder / "3.png")
    with pytest.raises(HipaError, match=r"has 48x32 pixels .* Expected 128x128"):
        rival_images(MODEL, ImageFolder(folder), PROMPTS, SEEDS)


def test_contenders_that_do_not_fit_the_model(model_dir: Path) -> None:
    with pytest.raises(HipaError, match="is for the task edit"):
        check_contenders([OtherAdaptor(ADAPTORS["emoji-edit"])], MODEL)
    with pytest.raises(HipaError, match=r"makes images of 128x128 pixels .* have 32x32"):
        check_rivals([BundleContender(BUNDLE)], model_dir, Style())
    facts = contender_facts(BundleContender(BUNDLE), model_dir, PROMPTS, SEEDS)
    assert "Its base model is another one than that of the other rows." in facts.notes
