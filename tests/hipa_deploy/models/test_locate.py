from pathlib import Path

import pytest

from hipa_deploy import embedded
from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder


def test_emoji_is_the_embedded_model_unless_a_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("emoji") == embedded.MODEL
    assert embedded.resolve_bundle("emoji") == embedded.BUNDLE
    (tmp_path / "emoji").mkdir()
    assert model_folder("emoji") == Path("emoji")
    assert embedded.resolve_bundle("emoji") == Path("emoji")
    assert embedded.resolve_adaptor("elsewhere") == Path("elsewhere")


@pytest.mark.parametrize("name", ["nothing-here", "/no/such/folder", "./relative/folder"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(HipaError, match="does not exist"):
        model_folder(name)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def unreachable(name: str) -> str:
        raise OSError(f"cannot reach the hub for {name}\nand more")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    expected = "owner/name: no such folder, and the hub did not provide it: cannot reach"
    with pytest.raises(HipaError, match=expected):
        model_folder("owner/name")
