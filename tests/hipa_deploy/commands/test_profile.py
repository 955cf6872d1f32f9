"""``hipa-profile``, ``hipa-profile compare`` and ``hipa-profile table``: mistakes are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hipa_deploy.bundle.folder import MANIFEST
from hipa_deploy.commands.app import main
from hipa_deploy.engines.latency.report import read_report
from tests.served import tiny_bundles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji", "--roofline", "rtx60"], "'rtx60' is unknown"),
        (["emoji", "--runs", "0"], "got 0 runs"),
        (["compare", "a.json"], "Missing argument"),
        (["compare", "a.json", "b.json"], "a.json is missing"),
        (["compare", "a.json", "b.json", "--threshold", "much"], "'much' is not a percentage"),
        (["table"], "Missing argument"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("profile", *arguments)


def test_an_image_too_small_for_the_bundle_s_watermark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tile of an enlargement has none of its own. The report says that it is not in the times."""
    root = tiny_bundles(tmp_path / "bundles")["tiny-upscale"].root
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    manifest["marks"] = {"watermark": True}
    (root / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    report = tmp_path / "report.json"
    command = ["profile", str(root), "--backend", "onnxruntime", "--runs", "2", "--warmup", "0"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--json", str(report)])
    assert stopped.value.code == 0
    capsys.readouterr()
    (warning,) = [line for line in read_report(report).warnings if "watermark" in line]
    assert "is not in the times" in warning
    with pytest.raises(SystemExit):
        main(["profile", "table", str(report)])
    assert "watermark is not in the times" in capsys.readouterr().out
