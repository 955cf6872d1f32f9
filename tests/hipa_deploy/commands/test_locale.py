"""Names with other characters than ASCII, in a locale that knows none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hipa_deploy import embedded

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
HIPA = (sys.executable, "-m", "hipa_deploy")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, **ASCII}
    return subprocess.run([*HIPA, *arguments], cwd=folder, env=env, capture_output=True)


def test_a_bundle_and_an_image_are_read_and_written(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("engines")
    shutil.copytree(embedded.BUNDLE, tmp_path / "büñdle-日本", ignore=ignored)
    done = run(tmp_path, "generate", "büñdle-日本", "3d emoji of a red äpple", "--out", "bïld.png")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "bïld.png\n"
    assert (tmp_path / "bïld.png").is_file()


def test_messages_show_names_as_they_are(tmp_path: Path) -> None:
    done = run(tmp_path, "generate", "büñdle", "apple")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("hipa: bundle büñdle does not exist.")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xff.png")
    done = subprocess.run(
        [*HIPA, "generate", "emoji", "apple", "--out", name], cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"b\xff.png\n")

    ignored = shutil.ignore_patterns("engines")
    bundle = tmp_path / os.fsdecode(b"bundle-\xff")
    shutil.copytree(embedded.BUNDLE, bundle, ignore=ignored)
    done = subprocess.run(
        [*HIPA, "generate", bundle.name, "apple"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
