"""The diagnosis of an engine, without a GPU and with invented ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hipa_deploy.doctor.examine import examine, render
from hipa_deploy.engines.store import diagnose as diagnose_module
from hipa_deploy.engines.store.diagnose import UNKNOWN, diagnose, engine_stage, is_engine
from hipa_deploy.engines.store.sidecar import engine_path
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import ORIN, RTX_4090, put_engine


@pytest.fixture
def orin(monkeypatch) -> None:
    """As on the Orin of engine_samples with TensorRT 10.13.3."""
    monkeypatch.setattr(diagnose_module, "find_gpu", lambda: ORIN)
    monkeypatch.setattr(diagnose_module, "_version", lambda library: "10.13.3")


def verdicts(path: Path) -> dict[str, str]:
    return {field.name: field.verdict for field in diagnose(path).fields}


@pytest.mark.usefixtures("orin")
def test_an_engine_that_fits_has_no_problem(make_bundle):
    path = put_engine(make_bundle(stages=("unet",)))
    for subject in (path, engine_path(path)):
        found = diagnose(subject)
        assert found.problems == ()
        assert {field.verdict for field in found.fields} == {"same"}
        assert found.path == str(engine_path(path))
        assert found.precision == "1 of 1 layers in float16, by the inspector"


@pytest.mark.usefixtures("orin")
def test_every_differing_field_is_shown_old_and_new(make_bundle):
    bundle = make_bundle(stages=("unet",))
    path = put_engine(bundle, tensorrt="10.3.0", driver="1.0", onnx_sha256="0" * 64)
    found = diagnose(path)
    changed = {
        field.name: (field.built, field.here)
        for field in found.fields
        if field.verdict == "differs"
    }
    assert changed.pop("onnx_sha256")[0] == "000000000000…"
    assert changed == {"tensorrt": ("10.3.0", "10.13.3"), "driver": ("1.0", "540.4")}
    assert found.problems == ("it does not fit here: onnx_sha256, tensorrt, driver differ.",)
    assert found.rebuild == f"Run: hipa-build {bundle.root} --backend tensorrt"


def test_without_a_gpu_and_tensorrt_their_fields_are_unknown(make_bundle, monkeypatch):
    monkeypatch.setattr(diagnose_module, "find_gpu", lambda: None)
    monkeypatch.setattr(diagnose_module, "_version", lambda library: None)
    path = put_engine(make_bundle(stages=("unet",)))
    found = {field.name: field for field in diagnose(path).fields}
    assert found["device"].here == UNKNOWN
    unknown = {name for name, field in found.items() if field.verdict == "unknown"}
    assert unknown == {"tensorrt", "compute_capabilities", "device", "driver", "cuda"}
    assert diagnose(path).problems == ()


def test_an_rtx_engine_is_bound_to_capabilities_alone(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    path = put_engine(bundle, library="rtx", gpu=RTX_4090)
    monkeypatch.setattr(diagnose_module, "_version", lambda library: "10.13.3")
    monkeypatch.setattr(diagnose_module, "find_gpu", lambda: RTX_4090)
    assert set(verdicts(path).values()) == {"same"}
    monkeypatch.setattr(
        diagnose_module, "find_gpu", lambda: RTX_4090.model_copy(update={"sm": 120})
    )
    assert [name for name, verdict in verdicts(path).items() if verdict == "differs"] == [
        "compute_capabilities"
    ]


@pytest.mark.usefixtures("orin")
def test_the_rebuild_command_keeps_the_options_and_quotes_the_path(make_bundle, tmp_path):
    bundle = make_bundle(stages=("unet",))
    options = BuildOptions(workspace_mib=64, optimization_level=3, tactic_dram_mib=512, refit=True)
    put_engine(bundle, options=options)
    moved = shutil.copytree(bundle.root, tmp_path / "my bundle")
    found = diagnose(next(moved.glob("engines/*/*.engine")))
    flags = "--optimization-level 3 --workspace 64 --tactic-dram 512 --refit"
    assert found.rebuild == f"Run: hipa-build '{moved}' --backend tensorrt {flags}"


@pytest.mark.usefixtures("orin")
@pytest.mark.parametrize("content", [b"short", b"an enginf", None])
def test_a_damaged_engine_is_a_problem(make_bundle, content):
    path = put_engine(make_bundle(stages=("unet",)))
    engine_path(path).unlink()
    if content is not None:
        engine_path(path).write_bytes(content)
    (problem,) = diagnose(path).problems
    assert ("is corrupt" if content else "is missing beside its sidecar") in problem


@pytest.mark.usefixtures("orin")
def test_an_engine_taken_out_of_its_bundle(make_bundle, tmp_path):
    path = put_engine(make_bundle(stages=("unet",)))
    away = tmp_path / "a" / "b" / path.name
    away.parent.mkdir(parents=True)
    shutil.copy(path, away)
    shutil.copy(engine_path(path), engine_path(away))
    assert verdicts(away)["onnx_sha256"] == "unknown"
    assert "is not a bundle" in diagnose(away).problems[0]


def test_no_manifest_or_report_is_to_be_removed(make_bundle):
    """The bundle's manifest is a JSON file too."""
    bundle = make_bundle(stages=("unet",))
    path = put_engine(bundle)
    for read in (diagnose, engine_stage):
        with pytest.raises(
            HipaError, match=r"hipa\.json is not an engine's sidecar, and no hipa\."
        ) as e:
            read(bundle.root / "hipa.json")
        assert "Remove" not in str(e.value)
        assert str(e.value).endswith("Expected a bundle's folder, an .engine file, or an image.")
    path.write_text("{")
    with pytest.raises(HipaError, match="Remove it and run hipa-build again"):
        diagnose(path)


def test_an_engine_without_a_sidecar(tmp_path):
    path = tmp_path / "unet.engine"
    with pytest.raises(
        HipaError, match=r"unet\.engine does not exist. Expected unet\.json beside the engine"
    ):
        diagnose(path)
    path.write_bytes(b"x")
    with pytest.raises(HipaError, match=r"unet\.engine has no sidecar"):
        diagnose(path)


@pytest.mark.usefixtures("orin")
def test_the_doctor_shows_it(make_bundle):
    path = put_engine(make_bundle(stages=("unet",)), driver="1.0")
    assert is_engine(path)
    assert not is_engine(path.parent)
    report = examine(str(path))
    assert report["engine"]["stage"] == "unet"
    assert any("does not fit here: driver differs" in problem for problem in report["problems"])
    assert render(report).renderables[1].row_count == len(report["engine"]["fields"])
    missing = examine(str(path.with_name("other.engine")))
    assert any("does not exist" in problem for problem in missing["problems"])


def test_a_path_from_inside_the_bundle_is_the_same_engine(make_bundle, monkeypatch):
    path = put_engine(make_bundle(stages=("unet",)))
    whole = diagnose(path)
    monkeypatch.chdir(path.parent)
    short = diagnose(Path(path.name))
    assert short.fields == whole.fields
    assert short.rebuild == whole.rebuild
