"""Code that was written for version 0.1.0 goes on working, and is told where to import from."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hipa_deploy.old_names import MOVED, RENAMED, ROOT

# Names that users of 0.1.0 imported, by their old module.
USED = {
    "hipa_deploy.bundle": ("Bundle", "Manifest", "AdaptorInfo"),
    "hipa_deploy.image_input": ("read_image",),
    "hipa_deploy.images": ("save_png", "read_recipe"),
    "hipa_deploy.models": ("model_folder",),
    "hipa_deploy.pipeline": ("OneStepPipeline",),
    "hipa_deploy.tokenizer": ("PromptTokenizer",),
    "hipa_deploy.train.base_model": ("DiffusionModel",),
    "hipa_deploy.train.originals": ("folder_originals",),
    "hipa_deploy.train.recipe": ("Recipe",),
    "hipa_deploy.export.bundle": ("export_bundle",),
    "hipa_deploy.export.options": ("ExportOptions",),
    "hipa_deploy.engines.profile": ("profile_pipeline",),
}


@pytest.mark.parametrize("old", sorted(USED))
def test_a_name_of_0_1_0_is_the_one_of_today(old: str) -> None:
    module = importlib.import_module(old)
    for name in USED[old]:
        with pytest.warns(DeprecationWarning, match="goes away with version"):
            value = getattr(module, name)
        assert value is getattr(sys.modules[value.__module__], value.__name__)
        assert value.__module__ != old


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_module_is_found_and_its_homes_exist(old: str) -> None:
    importlib.import_module(f"{ROOT}.{old}")
    for home in MOVED[old]:
        assert importlib.util.find_spec(f"{ROOT}.{home}") is not None


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_renamed_name_is_found(old: str) -> None:
    module = importlib.import_module(f"{ROOT}.{old}")
    for name, now in RENAMED[old].items():
        with pytest.warns(DeprecationWarning, match="goes away"):
            assert getattr(module, name).__name__ == now


def test_a_name_that_never_was_is_an_error() -> None:
    import hipa_deploy.tokenizer  # an old module

    with pytest.raises(AttributeError, match=r"hipa_deploy.tokenizer' has no attribute 'Nothing'"):
        _ = hipa_deploy.tokenizer.Nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hipa_deploy.nothing")


def test_the_warning_names_the_line_of_the_user() -> None:
    script = "from hipa_deploy.tokenizer import PromptTokenizer"
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True
    )
    assert "hipa_deploy.generate.tokenizer.PromptTokenizer now" in result.stderr
