"""The values of --lora and --embedding."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.bundle.manifest import LoraInfo
from hipa_deploy.errors import HipaError
from hipa_deploy.models.style import (
    EmbeddingChoice,
    LoraChoice,
    Style,
    check_same_loras,
    parse_embedding,
    parse_lora,
    parse_style,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of awkward names, as on Windows too."""
    monkeypatch.chdir(tmp_path)
    for name in ("style.safetensors", "C:style.safetensors", "at:2", "cat.pt"):
        Path(name).touch()
    Path("folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("style.safetensors:5e-1", "style.safetensors", 0.5),
        ("C:style.safetensors", "C:style.safetensors", 1.0),
        ("C:style.safetensors:2", "C:style.safetensors", 2.0),
        ("at:2", "at:2", 1.0),  # a file of that name
        ("at:2:3", "at:2", 3.0),
        ("folder:0.5", "folder", 0.5),
    ],
)
def test_only_a_number_at_the_end_is_a_scale(
    here: Path, text: str, path: str, scale: float
) -> None:
    assert parse_lora(text) == LoraChoice(Path(path), scale)


@pytest.mark.parametrize("text", ["gone.safetensors", "gone:0.5", "style.safetensors:strong", ""])
def test_a_lora_that_does_not_exist(here: Path, text: str) -> None:
    with pytest.raises(HipaError, match=r"does not exist\. Expected a LoRA's file or folder"):
        parse_lora(text)


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_that_is_not_finite(here: Path, scale: str) -> None:
    with pytest.raises(HipaError, match="the scale is not finite"):
        parse_lora(f"style.safetensors:{scale}")


def test_an_embedding_and_its_word(here: Path) -> None:
    assert parse_embedding("cat.pt") == EmbeddingChoice(Path("cat.pt"))
    assert parse_embedding("cat.pt:<cat>") == EmbeddingChoice(Path("cat.pt"), "<cat>")
    assert parse_embedding("cat.pt:a:b") == EmbeddingChoice(Path("cat.pt"), "a:b")
    with pytest.raises(HipaError, match="the token is empty"):
        parse_embedding("cat.pt:")
    with pytest.raises(HipaError, match=r"does not exist\. Expected a file of an embedding"):
        parse_embedding("dog.pt:<dog>")


def test_nothing_is_no_style() -> None:
    assert parse_style(None, None) == Style()
    assert not Style()


def info(sha256: str, scale: float = 1.0) -> LoraInfo:
    return LoraInfo(name=f"{sha256}.safetensors", sha256=sha256, scale=scale)


def test_an_adaptor_meets_the_loras_that_it_was_trained_on() -> None:
    trained = [info("a"), info("b", 0.5)]
    check_same_loras(Path("x"), [], trained)
    check_same_loras(Path("x"), trained, trained)
    check_same_loras(Path("x"), trained, [*trained, info("c")])
    for given in ([], trained[:1], trained[::-1], [info("a"), info("b", 0.6)]):
        with pytest.raises(
            HipaError, match=r"--lora a\.safetensors:1 --lora b\.safetensors:0\.5\.$"
        ):
            check_same_loras(Path("x"), trained, given)
