"""``hipa-publish``: mistakes are refused before the network, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.commands.app import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji", "--repo", "me"], "--repo me is no name of a repository"),
        (["emoji", "--repo", "me/x", "--base-model", "b"], "--base-model b is no name"),
        (["emoji", "--repo", "me/x", "--license", "GPL 3"], "no identifier of a licence"),
        (["nope", "--repo", "me/x", "--dry-run", "out"], "nope does not exist"),
        ([".", "--repo", "me/x", "--dry-run", "out"], "neither an adaptor nor a bundle"),
        (["emoji", "--repo", "me/x", "--dry-run", "."], "current folder"),
        (["emoji", "--repo", "me/x", "--report", "no", "--dry-run", "out"], "has no report.md"),
        (["emoji", "--repo", "me/x"], "HF_TOKEN"),
        # What does not exist is named although the token is missing too.
        (["nope", "--repo", "me/x"], "nope does not exist"),
        (["emoji", "--repo", "me/x", "--report", "no"], "has no report.md"),
        (["emoji", "--repo", "me/x", "--model", "no"], "no does not exist"),
    ],
)
def test_a_mistake(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        main(["publish", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["publish", "emoji", "--repo", "me/x", "--license", "mit", "--dry-run", "out"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == "out\n"
    assert (tmp_path / "out" / "README.md").is_file()
