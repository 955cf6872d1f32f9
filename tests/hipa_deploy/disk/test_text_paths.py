from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.models.style import EmbeddingChoice, LoraChoice


def test_paths_of_options_may_be_text() -> None:
    options = ExportOptions(model="emoji", out="bundle", adaptor="adaptor")  # type: ignore[arg-type]
    assert options == ExportOptions(model="emoji", out=Path("bundle"), adaptor=Path("adaptor"))
    # What is no path stays: a model may be a name.
    assert options.model == "emoji"
    assert options.decoder is None

    swap = SwapOptions(model="emoji", adaptor=None, bundle="bundle", out="out")  # type: ignore[arg-type]
    assert (swap.adaptor, swap.bundle, swap.out) == (None, Path("bundle"), Path("out"))
    assert LoraChoice("style.safetensors").path.suffix == ".safetensors"  # type: ignore[arg-type]
    assert EmbeddingChoice("word.pt").path.stem == "word"  # type: ignore[arg-type]


def test_a_field_without_a_path_is_an_error_of_the_caller() -> None:
    with pytest.raises(HipaError, match=r"adaptor is empty\. Expected a path"):
        ExportOptions(model="emoji", out="bundle", adaptor="")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ExportOptions(model="emoji", out=None)  # type: ignore[arg-type]
