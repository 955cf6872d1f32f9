"""Sidecars: an engine and its JSON file have to be whole before the engine is loaded."""

from __future__ import annotations

import os

import pytest

from hipa_deploy.engines.store.select import backend_with_engines, open_engine
from hipa_deploy.engines.store.sidecar import engine_path, find_sidecars, read_sidecar
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import CONTENT, put_engine


def test_sidecars_are_found_newest_first(make_bundle):
    bundle = make_bundle(stages=("unet",))
    older = put_engine(bundle)
    newer = put_engine(bundle, tensorrt="11.4")
    os.utime(older, ns=(1, 1))
    assert list(find_sidecars(bundle, "unet", "tensorrt")) == [newer, older]
    os.utime(newer, ns=(0, 0))
    assert list(find_sidecars(bundle, "unet", "tensorrt")) == [older, newer]
    assert find_sidecars(bundle, "unet", "rtx") == {}


def test_a_copy_of_the_bundle_keeps_which_engine_was_chosen(make_bundle):
    """Copies do not keep the times of files: what the sidecar says counts more."""
    bundle = make_bundle(stages=("unet",))
    paths = [put_engine(bundle), put_engine(bundle, tensorrt="11.4")]
    for path, other in (paths, reversed(paths)):
        for chosen_at, changed in ((path, 100.0), (other, 50.0)):
            sidecar = read_sidecar(chosen_at).model_copy(update={"chosen_at": changed})
            chosen_at.write_text(sidecar.model_dump_json())
        for older in paths:
            os.utime(older, ns=(1, 1))
            assert list(find_sidecars(bundle, "unet", "tensorrt")) == [path, other]
            os.utime(older)


def test_a_file_that_says_nothing_comes_behind_one_that_was_chosen(make_bundle):
    """A copy gives it the time of the copy."""
    bundle = make_bundle(stages=("unet",))
    chosen = put_engine(bundle)
    old = put_engine(bundle, tensorrt="11.4")
    sidecar = read_sidecar(chosen).model_copy(update={"chosen_at": 1.0})
    chosen.write_text(sidecar.model_dump_json())
    os.utime(old)
    assert list(find_sidecars(bundle, "unet", "tensorrt")) == [chosen, old]


@pytest.mark.parametrize("content", [CONTENT[:-1], b"an engin?"])
def test_a_damaged_engine_is_not_deserialised(make_bundle, on_orin, content):
    bundle = make_bundle(stages=("unet",))
    path = engine_path(put_engine(bundle))
    path.write_bytes(content)
    with pytest.raises(HipaError, match=r"corrupt: .*hipa-build"):
        open_engine(bundle, "unet", "tensorrt")
    path.unlink()
    with pytest.raises(HipaError, match="is missing beside its sidecar"):
        open_engine(bundle, "unet", "tensorrt")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 2}', "\x00"])
def test_a_broken_sidecar_is_one_line(make_bundle, on_orin, text):
    bundle = make_bundle(stages=("unet",))
    put_engine(bundle).write_text(text)
    with pytest.raises(HipaError, match="is not an engine's sidecar"):
        open_engine(bundle, "unet", "tensorrt")
    assert backend_with_engines(bundle) is None
