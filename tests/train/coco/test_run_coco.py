"""The whole measurement on a small folder in COCO's layout, by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.commands.app import main
from hipa_deploy.embedded import ADAPTOR, BUNDLE, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.read_marks import read_parameters
from hipa_deploy.models.style import Style
from hipa_deploy.train.coco import make_parts
from hipa_deploy.train.coco.coco_report import CocoReport
from hipa_deploy.train.coco.coco_request import CocoWishes, check_coco
from hipa_deploy.train.coco.entries import Models, adaptor_entry, teacher_entry
from hipa_deploy.train.coco.parts import Parts, Shard, begin_job
from hipa_deploy.train.coco.protocol import INCEPTION_SHA256, Protocol
from hipa_deploy.train.evaluation.quality import one_step_images
from hipa_deploy.train.recipes.recipe import TeacherSettings
from tests.coco_samples import write_clip, write_coco
from tests.inception_layout import SmallLayers, write_inception


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with coco, clip and inception.pt."""
    folder = tmp_path_factory.mktemp("files")
    write_coco(folder / "coco", images=6)
    write_clip(folder / "clip")
    write_inception(folder / "inception.pt", SmallLayers())
    return folder


def arguments(files: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", "--coco", str(files / "coco"), "--inception", str(files / "inception.pt"),
            "--clip", str(files / "clip"), "--out", str(out), *more]  # fmt: skip


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code or 0


def test_shards_an_interruption_and_the_report(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hipa_deploy.train.coco.parts.PART", 2)
    out = tmp_path / "out"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for number, path in enumerate(sorted((files / "coco/val2017").iterdir())):
        shutil.copy(path, theirs / f"{number}.jpg")
    command = arguments(files, out, "--rival", str(BUNDLE), "--rival", str(theirs), "--batch", "2")

    # One of two shards; then the other one, interrupted after an image was made.
    assert run(*command, "--shard", "0/2") == 0
    assert "left for the others" in " ".join(capsys.readouterr().err.split())
    assert not (out / "report.md").exists()
    written = make_parts.write_file
    made: list[Path] = []

    def stop(path: Path, content: bytes) -> None:
        written(path, content)
        made.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_parts, "write_file", stop)
    assert run(*command, "--shard", "1/2") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(make_parts, "write_file", written)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert made[0] in times

    # The command without a shard makes what is missing, and the report.
    assert run(*command) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    report = CocoReport.model_validate_json((out / "report.json").read_text())
    assert list(report.rows) == ["HiPA, one step", "bundle (bundle)", "theirs (images)"]
    assert report.figure == "Fréchet distance"
    # Their images are the real ones, cropped and scaled alike.
    assert report.rows["theirs (images)"].fid == pytest.approx(0, abs=1e-6)
    # The bundle is the adaptor in float16: their images differ by the rounding.
    hipa, bundle, _ = report.rows.values()
    assert bundle.fid == pytest.approx(hipa.fid, rel=0.01)
    assert bundle.clip == pytest.approx(hipa.clip, abs=0.01)
    assert report.differences["theirs (images)"].fid_interval[1] < 0
    text = (out / "report.md").read_text()
    for words in (
        "no FID, and compare with each other only", "6 images in place of 5,000",
        "another model than the peers' ViT-g-14", "do not say their seeds",
        "bicubic to 299x299 in float", "A photo depicts", "all images of val2017",
    ):  # fmt: skip
        assert words in text

    # The images are those of the seeds and captions, and say so.
    image = next(path for path in sorted(times) if path.parent.parent.name.startswith("hipa"))
    parameters = read_parameters(image)
    assert parameters["seed"] == 1_000_000 + int(image.stem)
    expected = one_step_images(
        MODEL, ADAPTOR, [parameters["prompt"]], [parameters["seed"]], device="cpu"
    )[0]
    assert np.abs(read_image(image).astype(int) - expected).max() <= 1

    # Another measurement does not mix with this one, and no report is lost.
    assert run(*command) == 1
    assert "report.md exists" in capsys.readouterr().err
    assert run(*command, "--force", "--resolution", "64") == 1
    assert "its resolution was 256, now it is 64" in capsys.readouterr().err


def test_a_network_that_cannot_be_loaded_begins_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.pt").write_bytes(b"no network")
    out = tmp_path / "out"
    assert run(*arguments(files, out, "--inception", str(tmp_path / "wrong.pt"))) == 1
    assert "wrong.pt cannot be loaded" in capsys.readouterr().err
    assert not out.exists()


def test_what_a_row_depends_on_names_its_folder() -> None:
    plain = Models(MODEL, Style(), TextSettings(context_tokens=77))
    long = Models(MODEL, Style(), TextSettings(context_tokens=154))
    one = adaptor_entry(plain, ADAPTOR).identity
    assert one == adaptor_entry(plain, ADAPTOR).identity
    assert one != adaptor_entry(long, ADAPTOR).identity
    assert json.loads(json.dumps(one)) == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "Give one: --out FOLDER"),
        ({"prompts": Path("p.txt")}, "Give a list of captions: --captions FILE"),
        ({"inception": None}, "--coco needs Inception v3"),
        ({"reference": "some"}, "--reference some. Expected all or captioned"),
        ({"resolution": 8}, "--resolution is 8. Expected 32 to 1024"),
        ({"batch": 0}, "--batch is 0. Expected 1 to 64"),
        ({"shard": "4/4"}, "--shard 4/4. Expected NUMBER/COUNT"),
        ({"clip": Path("nowhere")}, "is no folder of transformers' CLIP"),
        ({"year": 2014}, "has no annotations/captions_val2014.json"),
        ({"folder": Path("nope"), "out": None}, "--coco nope does not exist"),
        ({"captions": "nope.txt", "out": None}, "--captions nope.txt does not exist"),
        ({"inception": Path("nope.pt"), "out": None}, "--inception nope.pt is no file"),
    ],
)
def test_a_request_that_is_wrong(
    files: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    values = {"folder": files / "coco", "inception": files / "inception.pt", **changes}
    out = values.pop("out", tmp_path / "out")
    prompts = values.pop("prompts", None)
    with pytest.raises(HipaError) as error:
        check_coco(CocoWishes(**values), out, prompts)
    assert message in str(error.value)


def test_two_sets_have_a_folder_each(files: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(files / "coco", both)
    write_coco(tmp_path / "more", images=5, year=2014)
    shutil.copytree(tmp_path / "more", both, dirs_exist_ok=True)
    request = check_coco(CocoWishes(both, files / "inception.pt"), tmp_path / "out", None)
    assert {path.name: known.figure for path, known in request.sets.items()} == {
        "2014": "FID-30k",
        "2017": "FID-5k",
    }


def test_a_set_stays_where_it_was_begun(files: Path, tmp_path: Path) -> None:
    wishes = CocoWishes(files / "coco", files / "inception.pt")
    out = tmp_path / "out"
    assert list(check_coco(wishes, out, None).sets) == [out]

    # The second set comes later.
    protocol = Protocol(
        year=2017, images=8, captions="first", captions_sha256="", resolution=64, reference="all",
        reference_sha256="", reference_images=8, inception_sha256="",
    )  # fmt: skip
    begin_job(out, protocol)
    both = tmp_path / "both"
    write_coco(both, images=5, year=2014)
    shutil.copytree(files / "coco", both, dirs_exist_ok=True)
    wishes = CocoWishes(both, files / "inception.pt")
    assert set(check_coco(wishes, out, None).sets) == {out, out / "2014"}

    # Both were there from the start, and one of them is measured again.
    again = tmp_path / "again"
    for place, known in check_coco(wishes, again, None).sets.items():
        begin_job(place, protocol.model_copy(update={"year": known.year}))
    only = CocoWishes(both, files / "inception.pt", year=2017)
    assert list(check_coco(only, again, None).sets) == [again / "2017"]


def test_the_teachers_row_does_not_depend_on_how_many_pairs_a_training_makes() -> None:
    models = Models(MODEL, Style(), TextSettings())
    rows = []
    for changes in ({}, {"pairs": 16_000}, {"batch": 8}, {"dtype": "float32"}, {"guidance": 3.0}):
        rows.append(teacher_entry(models, TeacherSettings(**{"pairs": 8} | changes)).identity)
    assert rows[0] == rows[1] == rows[2] == rows[3] != rows[4]


def test_the_name_of_the_tables_is_for_their_measurement_alone() -> None:
    values = {
        "year": 2014, "images": 30_000, "captions": "random", "captions_sha256": "", "clip": None,
        "resolution": 256, "reference": "all", "reference_sha256": "", "reference_images": 40_504,
        "inception_sha256": INCEPTION_SHA256,
    }  # fmt: skip
    protocol = Protocol(**values)
    assert protocol.figure == "FID-30k"
    assert protocol.departures == []
    changes = {"images": 2000, "resolution": 512, "reference": "captioned", "inception_sha256": ""}
    for name, value in changes.items():
        assert Protocol(**{**values, name: value}).departures != []
    assert Protocol(**{**values, "inception_sha256": ""}).figure == "Fréchet distance"
    assert Protocol(**{**values, "images": 5000}).figure == "FID-5000"


def test_parts_cover_every_image_once(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 250)
    covered = [number for part in parts.parts for number in parts.images_of(part)]
    assert covered == list(range(250))
    shards = [parts.missing(Shard(number, 2)) for number in range(2)]
    assert shards == [[0, 2], [1]]
    parts.write(1, {"features": np.zeros((100, 2048), np.float32)})
    assert parts.missing() == [0, 2]
    again = "Remove it, and run the command again"
    parts.write(0, {"features": np.zeros((99, 2048), np.float32)})
    with pytest.raises(
        HipaError, match=rf"part-00000.npz .*expected float32 \[100, 2048\].*{again}"
    ):
        Parts(tmp_path, 200).read("features")
    parts.path(0).write_bytes(b"no zip")
    with pytest.raises(HipaError, match=rf"File is not a zip file\. {again}"):
        Parts(tmp_path, 200).read("features")
    parts.write(0, {"clip": np.zeros(100, np.float32)})
    with pytest.raises(HipaError, match=f"has no features. {again}"):
        Parts(tmp_path, 200).read("features")
