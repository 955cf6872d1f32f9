"""Names of a stranger's manifest stay inside the folder, whatever they are."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.disk.reading import (
    check_regular,
    inside,
    inside_folder,
    lies_in,
    name_problem,
    shown,
)
from hipa_deploy.errors import HipaError

ESCAPES = [
    "",
    ".",
    "..",
    "../x",
    "unet/../../x",
    "unet/..",
    "/etc/passwd",
    "//etc/passwd",
    "unet//model.onnx",
    "unet/",
    "./x",
    "C:/x",
    "C:x",
    "x:stream",
    "..\\x",
    "unet\\model.onnx",
    "a\0b",
    "a\nb",
    "a\x1b[31mb",
    "a\udc80b",
    "a\u202eb",
    "x" * 1025,
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_out_or_hides_something_is_refused(tmp_path: Path, name: str) -> None:
    assert name_problem(name)
    with pytest.raises(HipaError, match=r"the file name .* (has|is) ") as caught:
        inside(tmp_path, name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@given(name=st.text(max_size=30) | st.lists(st.sampled_from([*"./\\:ax", ".."])).map("".join))
def test_whatever_is_accepted_stays_inside(name: str) -> None:
    folder = Path("/some/folder")
    if name_problem(name) is None:
        joined = os.path.normpath(folder / name)
        assert joined.startswith("/some/folder/")
        assert joined == str(folder / name), "a name has one form"


@pytest.mark.parametrize(
    "name", ["hipa.json", "unet/model.onnx", "äöü/模型 1.onnx", "..a/b..", "~"]
)
def test_an_ordinary_name_is_its_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    assert inside(tmp_path, name) == path


def test_a_link_is_followed_inside_and_refused_outside(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "unet").mkdir(parents=True)
    (bundle / "unet/model.onnx").write_text("x")
    (tmp_path / "secret").write_text("x")
    (bundle / "inner").symlink_to("unet/model.onnx")
    (bundle / "outer").symlink_to(tmp_path / "secret")
    (bundle / "folder").symlink_to(tmp_path)
    assert inside(bundle, "inner") == bundle / "inner"
    for name in ("outer", "folder/secret"):
        with pytest.raises(HipaError, match="is a link that leads out of"):
            inside(bundle, name)
    # The folder itself may be reached through a link.
    (tmp_path / "link").symlink_to(bundle)
    assert inside(tmp_path / "link", "unet/model.onnx")


def test_a_hub_cache_keeps_its_files_in_blobs(tmp_path: Path) -> None:
    blobs = tmp_path / "models--owner--name/blobs"
    snapshot = tmp_path / "models--owner--name/snapshots/1234"
    (snapshot / "bundle").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("x")
    (tmp_path / "secret").write_text("x")
    (snapshot / "hipa.json").symlink_to("../../blobs/abc")
    (snapshot / "bundle/hipa.json").symlink_to("../../../blobs/abc")
    (snapshot / "other").symlink_to("../../../secret")
    assert inside(snapshot, "hipa.json")
    assert inside(snapshot / "bundle", "hipa.json")
    with pytest.raises(HipaError, match="leads out"):
        inside(snapshot, "other")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, words in {
            "pipe": "is a pipe",
            "folder": "is a folder",
            "loop": "cannot be read",
            "device": "is a device",
            "socket": "is a socket",
            "gone": "is missing",
        }.items():
            with pytest.raises(HipaError, match=words):
                check_regular(tmp_path / name)


def test_a_folder_to_write_into_may_not_lead_out(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    assert inside_folder(bundle, "engines/rtx-rtx40") == bundle / "engines/rtx-rtx40"
    (bundle / "engines").symlink_to(tmp_path)
    with pytest.raises(HipaError, match="is a link that leads out of"):
        inside_folder(bundle, "engines/rtx-rtx40")
    (bundle / "engines").unlink()
    shutil.rmtree(bundle)
    assert inside_folder(bundle, "engines") == bundle / "engines", "it need not exist"


def test_a_name_is_in_its_folder_and_not_in_one_that_begins_like_it() -> None:
    assert lies_in("unet/model.onnx", "unet")
    assert not lies_in("unet2/model.onnx", "unet")
    assert lies_in("model.onnx", ".")


def test_a_name_in_a_message_is_cut_and_escaped() -> None:
    assert shown("unet/model.onnx") == "unet/model.onnx"
    assert shown("a\x1bb") == r"'a\x1bb'"
    assert shown("a b") == "'a b'"
    assert len(shown("x" * 5000)) == 81
