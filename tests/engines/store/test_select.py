"""The choice of an engine, on engines that are files of bytes."""

from __future__ import annotations

import sys

import pytest

from hipa_deploy.bundle.manifest import Axis
from hipa_deploy.engines.store import select
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.select import (
    backend_with_engines,
    open_engine,
    select_engine,
)
from hipa_deploy.engines.store.sidecar import engine_path, read_sidecar
from hipa_deploy.errors import HipaError, MissingDependencyError
from tests.engines.engine_samples import ORIN, RTX_4090, put_engine, write_bundle

# A value that does not fit for every field of the key.
CHANGES = {
    "onnx_sha256": "0" * 64,
    "external_sha256": ("1" * 64,),
    "precision": "fp32",
    "tensorrt": "10.3.0",
    "compute_capabilities": (86,),
    "device": "Orin NX",
    "driver": "1.0",
    "cuda": "11.4",
    "l4t": "35.1",
    "axes": {"batch": Axis(min=1, opt=1, max=2)},
}


def test_every_field_of_the_key_but_options_and_library_is_tried():
    assert CHANGES.keys() == EngineKey.model_fields.keys() - {
        "options",
        "flavour",
        "repairs",
    }


@pytest.mark.parametrize("field", CHANGES)
def test_each_mismatch_is_named_before_deserialising(make_bundle, on_orin, field):
    bundle = make_bundle(stages=("unet",))
    path = put_engine(bundle, **{field: CHANGES[field]})
    with pytest.raises(HipaError) as caught:
        open_engine(bundle, "unet", "tensorrt")
    message = str(caught.value)
    assert f"{engine_path(path)} does not fit: {field} was " in message
    assert message.endswith(f"Run: hipa-build {bundle.root} --backend tensorrt")
    assert message.count(" was ") == 1
    assert backend_with_engines(bundle) is None


def test_a_mismatch_shows_old_and_new(make_bundle, on_orin):
    bundle = make_bundle(stages=("unet",))
    put_engine(bundle, tensorrt="10.3.0", compute_capabilities=(86, 89))
    tensorrt = r"tensorrt was 10\.3\.0, is 10\.13\.3"
    capabilities = r"compute_capabilities was \[86, 89\], is \[87\]"
    with pytest.raises(HipaError, match=f"{tensorrt}; {capabilities}"):
        open_engine(bundle, "unet", "tensorrt")


def test_a_new_export_makes_engines_stale(make_bundle, on_orin):
    bundle = make_bundle(stages=("vae_decoder",))
    put_engine(bundle, "vae_decoder")
    (bundle.root / "vae_decoder/model.onnx.data").write_bytes(b"other weights")
    with pytest.raises(HipaError, match="fit: external_sha256 was "):
        open_engine(write_bundle(bundle.root), "vae_decoder", "tensorrt")


def test_the_fitting_engine_is_chosen_among_others(make_bundle):
    bundle = make_bundle(stages=("unet",))
    fitting = put_engine(bundle)
    put_engine(bundle, tensorrt="11.4")
    assert select_engine(bundle, "unet", "tensorrt", "10.13.3", ORIN) == fitting


def test_rtx_engines_hold_for_any_driver_and_any_of_their_gpus(make_bundle):
    bundle = make_bundle(stages=("unet",))
    path = put_engine(bundle, library="rtx", compute_capabilities=(86, 89, 120))
    assert read_sidecar(path).key.driver is None
    assert select_engine(bundle, "unet", "rtx", "10.13.3", RTX_4090) == path
    with pytest.raises(HipaError, match=r"compute_capabilities was \[86, 89, 120\], is \[87\]"):
        select_engine(bundle, "unet", "rtx", "10.13.3", ORIN)


def test_an_engine_without_sidecar_is_no_engine(make_bundle, on_orin):
    bundle = make_bundle(stages=("unet",))
    put_engine(bundle).unlink()
    with pytest.raises(HipaError, match=r"no tensorrt engine for stage unet\. Run: hipa-build"):
        open_engine(bundle, "unet", "tensorrt")


def test_a_backend_needs_an_engine_for_every_stage(make_bundle, on_orin):
    bundle = make_bundle()
    put_engine(bundle, "unet")
    assert backend_with_engines(bundle) is None
    put_engine(bundle, "vae_decoder")
    assert backend_with_engines(bundle) == "tensorrt"


def test_without_engines_no_gpu_is_looked_for(make_bundle, monkeypatch):
    monkeypatch.setattr(select, "find_gpu", lambda: pytest.fail("looked for a GPU"))
    assert backend_with_engines(make_bundle()) is None


def test_without_a_gpu_the_message_says_so(make_bundle, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    bundle = make_bundle(stages=("unet",))
    put_engine(bundle, library="rtx")
    monkeypatch.setattr(select, "find_gpu", lambda: None)
    with pytest.raises(HipaError, match="rtx needs an NVIDIA GPU and its driver, and none answers"):
        open_engine(bundle, "unet", "rtx")
    assert backend_with_engines(bundle) is None


@pytest.mark.parametrize(("library", "module"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_a_missing_package_gives_the_pip_command(make_bundle, monkeypatch, library, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"hipa-deploy\[{library}\]"):
        open_engine(make_bundle(), "unet", library)
