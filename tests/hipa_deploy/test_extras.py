import subprocess
import sys

import pytest

from hipa_deploy import extras
from hipa_deploy.errors import HipaError, MissingDependencyError


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_nothing_is_missing_here(extra: str) -> None:
    if extra == "ray":
        pytest.importorskip("ray")  # large, and no part of a development install
    assert extras.missing(extra) == []
    extras.require(extra)


def test_a_missing_module_comes_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(
        MissingDependencyError,
        match=r"peft is not installed. Run: pip install 'hipa-deploy\[train\]'",
    ):
        extras.require("train")


@pytest.mark.parametrize("extra", ["train", "export"])
def test_a_package_that_is_too_new(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "version", lambda package: "6.0.1")
    with pytest.raises(
        HipaError,
        match=r"transformers 6.0.1 is installed. Expected a version below 6. Run: pip install",
    ):
        extras.require(extra)
    # Others have no such bound.
    extras.require("serve")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--out", "x"],
        ["export", "--model", "emoji", "--out", "x"],
        ["evaluate"],
        ["demo", "--out", "x"],
    ],
)
def test_a_core_install_says_what_a_verb_needs(arguments: list[str], tmp_path) -> None:
    """The verb runs in an interpreter that finds none of the extras' packages."""
    code = (
        "import sys, importlib.abc\n"
        "ABSENT = {'torch', 'diffusers', 'transformers', 'peft', 'onnx', 'onnxscript'}\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ABSENT:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import hipa_deploy.extras as extras\n"
        "real = extras.find_spec\n"
        "extras.find_spec = lambda name: None if name in ('torch', 'onnx') else real('json')\n"
        f"from hipa_deploy.commands.app import main\nmain({arguments!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "pip install 'hipa-deploy[" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
