"""What is there before a command is there after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hipa_deploy.commands.app import main
from hipa_deploy.commands.make_images import image_outputs
from hipa_deploy.errors import HipaError

Refused = Callable[..., str]


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def test_without_out_the_next_free_name_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(b"mine")
    run("generate", "emoji", "3d emoji of a red apple")
    printed = capsys.readouterr()
    assert printed.out == "image-2.png\n"
    assert printed.err == "image.png exists: writing image-2.png\n"
    assert Path("image.png").read_bytes() == b"mine"
    first = Path("image-2.png").read_bytes()

    run("generate", "emoji", "3d emoji of a lemon", "--out", "image-2.png", "--force")
    assert Path("image-2.png").read_bytes() != first
    assert {path.name for path in tmp_path.iterdir()} == {"image.png", "image-2.png"}


def test_several_images_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"images/000-seed{seed}.png" for seed in (0, 1)]
    assert image_outputs(None, 1, 2, 0) == [Path(name) for name in names]
    Path("images").mkdir()
    assert image_outputs(None, 1, 2, 0)[0].parent == Path("images-2")


def test_one_of_several_images_exists(tmp_path: Path) -> None:
    (tmp_path / "000-seed3.png").touch()
    with pytest.raises(HipaError, match=r"000-seed3\.png exists\. Add --force"):
        image_outputs(tmp_path, 1, 4, 0)
    assert len(image_outputs(tmp_path, 1, 4, 0, force=True)) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", "emoji", "a.png", "apple"),
        ("inpaint", "emoji", "b.png", "a.png", "apple"),
        ("inpaint", "emoji", "a.png", "b.png", "apple"),
        ("upscale", "emoji", "a.png"),
    ],
)
def test_the_image_to_start_from_is_never_the_result(
    arguments: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "link.png").hardlink_to(tmp_path / "a.png")
    assert "never written over" in refused(*arguments, "--out", "link.png", "--force")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "emoji", "apple", "--out", "taken.png"),
        ("profile", "emoji", "--json", "taken.png"),
        ("profile", "emoji", "--html", "taken.png"),
        ("profile", "compare", "a.json", "b.json", "--json", "taken.png"),
        ("doctor", "--self-test", "--out", "taken.png"),
        ("evaluate", "--json", "taken.png"),
        ("train", "--out", "taken.png"),
        ("export", "--model", "emoji", "--out", "taken.png"),
        ("demo", "--out", "taken.png"),
    ],
)
def test_a_file_that_exists_is_kept(
    arguments: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    refused(*arguments)
    assert (tmp_path / "taken.png").read_bytes() == b"mine"


def test_a_report_of_an_evaluation_is_kept(tmp_path: Path, refused: Refused) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "samples.png").write_bytes(b"mine")
    assert "samples.png exists. Add --force" in refused("evaluate", "--out", "report")


def test_a_report_that_is_compared_is_never_the_result(tmp_path: Path, refused: Refused) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    arguments = ("profile", "compare", "a.json", "b.json", "--json", "a.json", "--force")
    assert "never written over" in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("triton", "absent", "--out", "full"),
        ("profile", "absent", "--json", "image.png"),
        ("profile", "compare", "absent", "absent", "--json", "image.png"),
        ("export", "--model", "absent", "--out", "full"),
        ("export", "--model", "emoji", "--adaptor", "absent", "--out", "full"),
        ("export", "--model", "emoji", "--prompts", "absent", "--out", "full"),
        (
            "export",
            "--model",
            "emoji",
            "--adaptor",
            "absent",
            "--swap-for",
            "emoji",
            "--out",
            "full",
        ),
        (
            "export",
            "--model",
            "emoji",
            "--adaptor",
            "emoji",
            "--swap-for",
            "absent",
            "--out",
            "full",
        ),
        ("train", "--model", "absent", "--out", "full"),
        ("train", "--from", "absent", "--out", "full"),
        ("train", "--recipe", "absent", "--out", "full"),
        ("train", "--average", "absent", "--average", "emoji", "--out", "full"),
        ("publish", "absent", "--repo", "user/name", "--dry-run", "full"),
        ("generate", "absent", "apple", "--out", "image.png"),
        ("edit", "emoji", "absent", "apple", "--out", "image.png"),
        ("inpaint", "emoji", "image.png", "absent", "apple", "--out", "image.png"),
        ("upscale", "emoji", "absent", "--out", "image.png"),
        ("evaluate", "--adaptor", "absent", "--json", "image.png"),
    ],
    ids=" ".join,
)
def test_what_is_missing_is_named_before_an_output_that_is_there(
    refused: Refused, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "absent" in refused(*arguments)
    assert " exists" not in refused(*arguments)
