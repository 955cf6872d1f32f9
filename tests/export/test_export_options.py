from pathlib import Path

import pytest

from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import parse_axes


def test_defaults_are_the_commands() -> None:
    options = ExportOptions(model="emoji", out=Path("out"))
    assert (options.dtype, options.layout, options.batch) == ("fp16", "onestep", 1)
    assert (options.adaptor, options.decoder, options.encoder, options.prompts) == (None,) * 4


def test_the_size_of_the_reference() -> None:
    axes = parse_axes("batch=1:2:4,height=384:512:768")
    options = ExportOptions(model="emoji", out=Path("out"), width=640, dynamic=axes)
    assert options.size("batch") == 2
    assert options.size("height") == 512
    assert options.size("width") == 640
    static = ExportOptions(model="emoji", out=Path("out"), batch=3)
    assert static.size("batch") == 3
    assert static.size("height") is None


def test_options_cannot_be_changed() -> None:
    options = ExportOptions(model="emoji", out=Path("out"))
    with pytest.raises(AttributeError):
        options.batch = 2  # type: ignore[misc]
