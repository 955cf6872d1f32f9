"""An engine is right or not delivered: builds on fakes whose engines really compute, some wrongly.

The stage is the embedded text encoder. Its second layer's key projection gives val_95.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import TEACHER_STAGE
from hipa_deploy.bundle.reference import TEACHER_TENSORS
from hipa_deploy.commands.app import main
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.doctor.examine import examine
from hipa_deploy.engines.build import build_stage, engine_check
from hipa_deploy.engines.build.build_stage import BuiltEngine, StageBuild, sidecar_path
from hipa_deploy.engines.build.suspects import bisect_stage, onnxruntime_run
from hipa_deploy.engines.store.diagnose import diagnose
from hipa_deploy.engines.store.engine_key import EngineKey, key_for
from hipa_deploy.engines.store.select import select_engine
from hipa_deploy.engines.store.sidecar import read_rejection, read_sidecar
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.errors import HipaError
from tests.engines.build.faulty_tensorrt import FaultyTensorRT
from tests.engines.engine_samples import ORIN
from tests.refine_samples import refine_bundle

STAGE = "text_encoder"
KEY_PROJECTION = "val_94"
LAYER = "text_encoder.text_model.encoder.layers.1"
VERSION = "10.9.0"  # without known faults here


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    root = tmp_path / "bundle"
    shutil.copytree(embedded.BUNDLE, root, ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(root)


def key_of(bundle: Bundle, version: str = VERSION, gpu=ORIN, stage: str = STAGE) -> EngineKey:
    target = Target(name="t", compute_capabilities=(gpu.sm,), **binding("tensorrt", gpu))
    return key_for(bundle, stage, "tensorrt", version, target, BuildOptions())


def build(
    bundle: Bundle,
    repair: bool = True,
    key: EngineKey | None = None,
    stage: str = STAGE,
    best_of: int = 1,
    **more,
) -> BuiltEngine:
    folder = bundle.root / "engines" / "tensorrt-t"
    folder.mkdir(parents=True, exist_ok=True)
    return StageBuild(
        bundle=bundle,
        stage=stage,
        key=key or key_of(bundle, stage=stage),
        folder=folder,
        options=BuildOptions(),
        best_of=best_of,
        repair=repair,
        reporter=lambda number: lambda event: None,
        **more,
    ).run()


def files(bundle: Bundle) -> set[str]:
    return {path.suffix for path in (bundle.root / "engines/tensorrt-t").iterdir()}


def tensorrt(monkeypatch, is_wrong=lambda job: False, **more) -> FaultyTensorRT:
    """A TensorRT whose engines have a wrong key projection where ``is_wrong`` says so."""
    fake = FaultyTensorRT(lambda job: [KEY_PROJECTION] if is_wrong(job) else [], **more)
    fake.install(monkeypatch)
    return fake


def test_a_right_engine_is_kept_with_its_parity(bundle, monkeypatch):
    fake = tensorrt(monkeypatch)
    built = build(bundle)
    check = built.sidecar.check
    assert (check.outcome, check.detail, check.least_psnr_db) == ("passed", "", 35)
    assert check.parity.psnr_db > 35
    assert built.sidecar.key.repairs is None
    assert built.sidecar.attempts == ()
    assert files(bundle) == {".engine", ".json"}
    assert build(bundle).up_to_date
    assert len(fake.jobs) == 1
    assert fake.gpu.cudart.leaks == []


def test_the_engine_that_was_asked_for_last_is_the_one_that_runs(bundle, monkeypatch):
    """Also where it is up to date: another one was built in between."""
    fake = tensorrt(monkeypatch)
    plain = build(bundle)
    key = key_of(bundle).model_copy(update={"options": BuildOptions(refit=True)})
    refittable = build(bundle, key=key)
    for built, again in ((plain, None), (refittable, key)):
        assert build(bundle, key=again).up_to_date
        chosen = select_engine(bundle, STAGE, "tensorrt", VERSION, ORIN)
        assert chosen == built.path.with_suffix(".json")
    assert len(fake.jobs) == 2


def test_a_driver_that_does_not_answer_is_no_fault_of_the_engine(bundle, monkeypatch):
    """nvidia-smi shows the GPU, and its driver is older than cuda-python."""
    fake = tensorrt(monkeypatch)
    fake.gpu.cudart.fail = "cudaGetDeviceCount"
    built = build(bundle)
    assert str(built.sidecar.check).startswith("not run: cudaGetDeviceCount failed")
    assert len(fake.jobs) == 1


def test_timings_that_are_lost_are_told(bundle, monkeypatch):
    fake = tensorrt(monkeypatch)

    def run_worker(job, report):
        problem = "/root/t.cache: Read-only file system"
        return fake.run_worker(job, report).model_copy(update={"timing_cache_problem": problem})

    monkeypatch.setattr(build_stage, "run_worker", run_worker)
    with pytest.warns(RuntimeWarning, match=r"could not be kept \(/root/t\.cache: Read-only"):
        assert not build(bundle).up_to_date


def test_without_a_gpu_the_check_is_not_run_and_is_made_up_for_later(bundle, monkeypatch):
    fake = tensorrt(monkeypatch)
    monkeypatch.setattr(engine_check, "find_gpu", lambda: None)
    built = build(bundle)
    assert str(built.sidecar.check) == "not run: no NVIDIA GPU with a driver answers here"
    monkeypatch.setattr(engine_check, "find_gpu", lambda: ORIN.model_copy(update={"sm": 110}))
    assert "for another GPU than Orin (SM110)" in str(build_check(bundle, built))
    monkeypatch.setattr(engine_check, "find_gpu", lambda: ORIN)
    again = build(bundle)
    assert again.up_to_date
    assert again.sidecar.check.outcome == "passed"
    assert read_sidecar(again.path.with_suffix(".json")) == again.sidecar
    assert len(fake.jobs) == 1


def build_check(bundle: Bundle, built: BuiltEngine):
    return engine_check.check_engine(bundle, STAGE, built.path, built.sidecar.key)


@pytest.mark.parametrize("fail", ["cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"])
def test_a_gpu_without_memory_says_nothing_of_an_engine(bundle, monkeypatch, fail):
    """Another program has the GPU's memory: nothing is mended, and nothing is rejected."""
    fake = tensorrt(monkeypatch)
    fake.gpu.cudart.fail = fail
    built = build(bundle)
    assert str(built.sidecar.check).startswith("not run: the GPU has no memory for it: ")
    assert len(fake.jobs) == 1
    assert files(bundle) == {".engine", ".json"}
    assert str(build(bundle).sidecar.check).startswith("not run")

    # It is made up for.
    fake.gpu.cudart.fail = ""
    assert build(bundle).sidecar.check.outcome == "passed"
    assert len(fake.jobs) == 1


def test_tensorrts_own_words_for_no_memory_are_known(bundle, monkeypatch):
    fake = tensorrt(monkeypatch)
    built = build(bundle)

    def run(*arguments):
        raise HipaError(
            "text_encoder: the engine gives no execution context: [executionContext.cpp::"
            "ExecutionContext::470] Error Code 2: OutOfMemory (no further information)."
        )

    monkeypatch.setattr(engine_check, "run_engine", run)
    assert build_check(bundle, built).outcome == "not run"
    assert len(fake.jobs) == 1


def test_an_engine_that_fails_is_kept_apart_with_its_report(bundle, monkeypatch):
    tensorrt(monkeypatch, lambda job: True)
    with pytest.raises(
        HipaError, match=r"^text_encoder: the engine is wrong: context is .* dB"
    ) as e:
        build(bundle, repair=False)
    assert "\n" not in str(e.value)
    assert files(bundle) == {".rejected", ".rejection"}

    # No command loads it.
    with pytest.raises(HipaError, match="no tensorrt engine for stage text_encoder"):
        select_engine(bundle, STAGE, "tensorrt", VERSION, ORIN)
    (path,) = (bundle.root / "engines/tensorrt-t").glob("*.rejected")
    report = read_rejection(path.with_suffix(".rejection"))
    assert report.sidecar.check.outcome == "failed"
    found = diagnose(path)
    assert found.problems[0].startswith("it failed its gate (failed: ")
    assert found.path == str(path)
    assert examine(str(path))["engine"]["repairs"] == "none"


def test_what_was_there_unchecked_and_is_wrong_is_taken_out_of_use(bundle, monkeypatch):
    wrong = True
    tensorrt(monkeypatch, lambda job: wrong)
    with monkeypatch.context() as patch:
        patch.setattr(engine_check, "find_gpu", lambda: None)
        first = build(bundle)
    with pytest.raises(HipaError, match="the engine is wrong"):
        build(bundle, repair=False)
    assert files(bundle) == {".rejected", ".rejection"}
    # A right one takes its place.
    wrong = False
    assert build(bundle).path == first.path
    assert files(bundle) == {".engine", ".json"}


def test_a_wrong_fusion_is_broken_by_an_output(bundle, monkeypatch):
    said = []
    fake = tensorrt(monkeypatch, lambda job: "val_95" not in job.mark)
    built = build(bundle, say=said.append)
    assert built.sidecar.key.repairs.barriers == ("val_95",)
    failed, mended = built.sidecar.attempts
    assert failed.check.outcome == "failed"
    assert mended.check.outcome == "passed"
    assert failed.latency_ms > 0
    assert mended.latency_ms > 0
    assert said[-1] == "built; mended by: outputs val_95"
    assert fake.gpu.cudart.leaks == []

    # It is found again, fits this machine, and the doctor says what it costs.
    count = len(fake.jobs)
    assert build(bundle).path == built.path
    assert len(fake.jobs) == count
    path = select_engine(bundle, STAGE, "tensorrt", VERSION, ORIN)
    assert path == built.path.with_suffix(".json")
    found = diagnose(path)
    assert found.repairs == "outputs val_95"
    assert "1.00 ms" in found.attempts[1]


def refining_bundle(folder: Path) -> Bundle:
    """The bundle that refines, with a reference of its base UNet, which the archive has not."""
    bundle = refine_bundle(folder)
    sizes = {"batch": 1}
    feed = {}
    rng = np.random.default_rng(0)
    for tensor in bundle.all_stages[TEACHER_STAGE].spec.inputs:
        feed[tensor.name] = rng.uniform(0, 2, tensor.at(sizes)).astype(tensor.dtype)
    outputs = onnxruntime_run(bundle.stage_path(TEACHER_STAGE), feed)(())
    path = bundle.root / TEACHER_TENSORS
    np.savez(path, **feed, **outputs)
    files = {**bundle.manifest.files, TEACHER_TENSORS: file_sha256(path)}
    return Bundle(bundle.root, bundle.manifest.model_copy(update={"files": files}))


def test_a_base_unet_that_fails_is_mended_or_kept_apart(tmp_path, monkeypatch):
    """It is timed as the stages of the path are."""
    bundle = refining_bundle(tmp_path)
    weight = "unet.conv_in.weight"
    fake = FaultyTensorRT(lambda job: [] if job.fp32 else [weight])
    fake.install(monkeypatch)
    key = key_of(bundle, "10.3.0", stage=TEACHER_STAGE)
    with pytest.warns(RuntimeWarning, match="float32 in attention"):
        mended = build(bundle, key=key, stage=TEACHER_STAGE)
    assert [attempt.check.outcome for attempt in mended.sidecar.attempts] == ["failed", "passed"]
    assert all(attempt.latency_ms > 0 for attempt in mended.sidecar.attempts)
    shutil.rmtree(mended.path.parent)

    fake.wrong_weights = lambda job: [weight]
    with pytest.raises(HipaError, match=r"^teacher: the engine is wrong: out_sample "):
        build(bundle, stage=TEACHER_STAGE, repair=False)
    assert files(bundle) == {".rejected", ".rejection"}


def test_the_fastest_of_several_base_unets_is_kept(tmp_path, monkeypatch):
    tensorrt(monkeypatch)
    built = build(refine_bundle(tmp_path), stage=TEACHER_STAGE, best_of=2)
    assert len(built.sidecar.candidates_ms) == 2


def test_of_many_builds_two_engines_lie_on_the_disk_at_most(bundle, monkeypatch):
    """Engines have gigabytes, and nobody wants one that is slower or wrong."""
    most = []
    fake = tensorrt(monkeypatch)
    run_worker = fake.run_worker

    def count(job, report):
        outcome = run_worker(job, report)
        most.append(len(list(job.out.parent.glob("*.tmp"))))
        return outcome

    monkeypatch.setattr(build_stage, "run_worker", count)
    times_ms = iter([3.0, 2.0, 2.5, 1.0, 4.0])
    monkeypatch.setattr(build_stage, "time_engine", lambda path, spec, library: next(times_ms))
    built = build(bundle, best_of=5)
    assert built.sidecar.candidates_ms == (3.0, 2.0, 2.5, 1.0, 4.0)
    assert built.path.read_text() == "engine 4", "the fastest"
    assert max(most) == 2
    shutil.rmtree(built.path.parent)

    # Repairs that do not help.
    fake.wrong_weights = lambda job: [KEY_PROJECTION]
    monkeypatch.setattr(build_stage, "time_engine", lambda path, spec, library, barriers=(): 1.0)
    most.clear()
    with pytest.raises(HipaError, match="repairs did not mend it"):
        build(bundle)
    assert len(most) > 4
    assert max(most) == 2


def test_the_same_fault_in_every_layer_gets_an_output_in_every_layer(bundle, monkeypatch):
    """As Thor's: each projection is right as soon as it is an output itself."""
    keys = {"val_32": "val_31", "val_95": "val_94", "val_154": "val_153"}
    fake = FaultyTensorRT(lambda job: [keys[name] for name in keys.keys() - set(job.mark)])
    fake.install(monkeypatch)
    built = build(bundle)
    assert keys.keys() <= set(built.sidecar.key.repairs.barriers)
    assert len(built.sidecar.key.repairs.barriers) <= 9


def test_a_wrong_layer_computes_in_float32(bundle, monkeypatch):
    fake = tensorrt(monkeypatch, lambda job: "val_95" not in job.fp32)
    with pytest.warns(RuntimeWarning, match="1 of 3 attentions cannot be fused") as warned:
        built = build(bundle)
    assert LAYER in str(warned[0].message)
    assert built.sidecar.key.repairs.islands == (LAYER,)
    assert built.sidecar.attention.fusable == 2
    assert built.sidecar.attention.islands == (LAYER,)
    tried = [attempt.repairs for attempt in built.sidecar.attempts]
    assert [bool(repairs.barriers) for repairs in tried] == [False, True, True, False]
    assert all(job.options.optimization_level is None for job in fake.jobs)


def test_another_level_is_the_last_that_is_tried(bundle, monkeypatch):
    tensorrt(
        monkeypatch,
        lambda job: job.options.optimization_level != 2,
        fails=lambda job: bool(job.fp32),
    )
    built = build(bundle)
    assert built.sidecar.key.repairs.optimization_level == 2
    assert built.sidecar.key.options == BuildOptions()
    errors = [attempt.error for attempt in built.sidecar.attempts if attempt.error]
    assert errors == ["could not find any implementation for node conv."] * 2


def test_what_nothing_mends_is_rejected_with_what_was_tried(bundle, monkeypatch):
    tensorrt(monkeypatch, lambda job: True)
    with pytest.raises(
        HipaError, match=r"repairs did not mend it.*the first wrong tensor is val_95"
    ):
        build(bundle)
    (path,) = (bundle.root / "engines/tensorrt-t").glob("*.rejection")
    report = read_rejection(path)
    assert report.bisection.block == LAYER
    assert len(report.sidecar.attempts) >= 6
    assert files(bundle) == {".rejected", ".rejection"}


def test_a_known_fault_has_its_remedy_from_the_start(bundle, monkeypatch):
    fake = tensorrt(monkeypatch)
    thor = ORIN.model_copy(update={"sm": 110})
    monkeypatch.setattr(engine_check, "find_gpu", lambda: thor)
    old = build(bundle, key=key_of(bundle, "10.9.0", thor))
    assert fake.jobs[-1].myelin == ()
    key = key_of(bundle, "10.13.3.9", thor)
    # An engine without the remedy, as an older version of this package built it.
    path = sidecar_path(old.path.parent, STAGE, key)
    shutil.copy(old.path, path.with_suffix(".engine"))
    path.write_text(old.sidecar.model_copy(update={"key": key}).model_dump_json())
    built = build(bundle, key=key)
    assert not built.up_to_date
    assert fake.jobs[-1].myelin == ("-peep:fc_h_fusion=off", "-peep:match_dual_gemm=off")
    assert built.sidecar.key.repairs.known_faults == ("fc-h-fusion", "match-dual-gemm")
    assert build(bundle, key=key).path == built.path


RTX_50 = ORIN.model_copy(update={"sm": 120, "name": "NVIDIA GeForce RTX 5090"})
FAULT = "fused-attention-sm120"


def test_a_documented_remedy_that_costs_time_is_applied_at_once(bundle, monkeypatch, capsys):
    fake = FaultyTensorRT(lambda job: [] if "val_73" in job.fp32 else [KEY_PROJECTION])
    fake.install(monkeypatch, RTX_50)
    key = key_of(bundle, "10.16.1.11", RTX_50)
    with pytest.warns(RuntimeWarning, match="float32 in attention"):
        built = build(bundle, key=key)
    assert len(fake.jobs) == 1, "not after a failed build"
    repairs = built.sidecar.key.repairs
    assert (repairs.known_faults, repairs.islands) == ((FAULT,), ("attention",))
    (remedy,) = built.sidecar.remedies
    assert remedy.fault == FAULT
    assert "No attention is fused" in remedy.cost
    assert remedy.sources == ("https://github.com/NVIDIA/TensorRT/issues/4837",)
    assert read_sidecar(built.path.with_suffix(".json")).remedies == (remedy,)
    assert diagnose(built.path).remedies == (str(remedy),)
    assert built.sidecar.attempts == ()
    assert build(bundle, key=key).up_to_date


def test_without_repairs_no_remedy_is_applied(bundle, monkeypatch):
    fake = FaultyTensorRT(lambda job: [])
    fake.install(monkeypatch, RTX_50)
    key = key_of(bundle, "10.16.1.11", RTX_50)
    with pytest.warns(RuntimeWarning, match="float32 in attention"):
        mended = build(bundle, key=key)
    plain = build(bundle, key=key, repair=False)
    assert not plain.up_to_date, "the engine with the remedy is another one"
    assert plain.path != mended.path
    assert plain.sidecar.key.repairs is None
    assert plain.sidecar.remedies == ()
    assert build(bundle, key=key, repair=False).path == plain.path
    assert build(bundle, key=key).path == mended.path
    assert len(fake.jobs) == 2


def test_a_remedy_that_is_left_out_comes_back_if_the_engine_is_wrong(bundle, monkeypatch):
    wrong = False
    fake = FaultyTensorRT(lambda job: [KEY_PROJECTION] if wrong and not job.fp32 else [])
    fake.install(monkeypatch, RTX_50)
    key = key_of(bundle, "10.16.1.11", RTX_50)
    built = build(bundle, key=key, without_remedies=(FAULT,))
    assert built.sidecar.key.repairs is None
    shutil.rmtree(built.path.parent)

    wrong = True
    with pytest.warns(RuntimeWarning, match="float32 in attention"):
        built = build(bundle, key=key, without_remedies=(FAULT,))
    assert built.sidecar.key.repairs.known_faults == (FAULT,)
    assert [attempt.check.outcome for attempt in built.sidecar.attempts] == ["failed", "passed"]
    assert all(attempt.latency_ms > 0 for attempt in built.sidecar.attempts), "what it costs"
    count = len(fake.jobs)
    assert build(bundle, key=key, without_remedies=(FAULT,)).path == built.path
    assert len(fake.jobs) == count


def test_without_remedy_and_without_check_there_is_a_warning(bundle, monkeypatch):
    FaultyTensorRT(lambda job: []).install(monkeypatch, RTX_50)
    monkeypatch.setattr(engine_check, "find_gpu", lambda: None)
    key = key_of(bundle, "10.16.1.11", RTX_50)
    with pytest.warns(RuntimeWarning, match=rf"without the remedy of {FAULT}, and not checked"):
        build(bundle, key=key, repair=False)


def test_a_build_that_fails_with_a_remedy_says_how_to_leave_it_out(bundle, monkeypatch):
    fake = FaultyTensorRT(lambda job: [], fails=lambda job: bool(job.fp32))
    fake.install(monkeypatch, RTX_50)
    with pytest.raises(HipaError, match=rf"To leave them out: --without-remedy {FAULT}$"):
        build(bundle, key=key_of(bundle, "10.16.1.11", RTX_50))


def test_a_build_that_fails_as_others_found_names_the_thread(bundle, monkeypatch):
    fake = FaultyTensorRT(lambda job: [], fails=lambda job: True)
    fake.install(monkeypatch)
    with pytest.raises(HipaError, match=r"node conv\. Known of this TensorRT: .*issues/4736"):
        build(bundle, key=key_of(bundle, "10.3.0"))
    monkeypatch.setattr(build_stage, "run_worker", lambda job, report: fail("the disk is full."))
    with pytest.raises(HipaError, match=r"the disk is full\.$"):
        build(bundle, key=key_of(bundle, "10.3.0"))


def fail(words: str):
    raise HipaError(words)


def test_the_command_knows_the_faults(capsys):
    for options, message in (
        (["--without-remedy", "nothing"], "no known fault of TensorRT is called nothing"),
        (["--without-remedy", FAULT, "--no-repair"], "Omit --without-remedy"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["build", "emoji", "--backend", "tensorrt", *options])
        assert message in capsys.readouterr().err


def test_a_costly_remedy_is_tried_before_the_search(bundle, monkeypatch):
    fake = tensorrt(monkeypatch, lambda job: "val_73" not in job.fp32)
    with pytest.warns(RuntimeWarning, match="float32 in attention"):
        built = build(bundle, key=key_of(bundle, "10.3.0"))
    assert built.sidecar.key.repairs.islands == ("attention",)
    assert len(fake.jobs) == 2


def test_lost_fusion_is_told(bundle, monkeypatch):
    tensorrt(monkeypatch, fused=1)
    with pytest.warns(RuntimeWarning, match="fused 1 attentions of 3 that it could"):
        built = build(bundle)
    assert str(built.sidecar.attention) == "1 of 3 fused; 3 could be"


def test_fusion_that_is_not_known_is_no_loss(bundle, monkeypatch):
    tensorrt(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build(bundle)
    assert str(built.sidecar.attention) == "not known how many of 3 fused; 3 could be"


def test_the_command_bisects_an_engine(bundle, monkeypatch, capsys):
    tensorrt(monkeypatch, lambda job: True)
    with pytest.raises(HipaError):
        build(bundle, repair=False)
    (path,) = (bundle.root / "engines/tensorrt-t").glob("*.rejected")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", str(path), "--bisect", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["block"], found["operator"]) == (LAYER, "MatMul")
    assert found["verdict"] == "layer"
    assert found["probes"][0]["tensor"] is None


def test_a_bisection_needs_an_engine_and_a_gpu(bundle, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "emoji", "--bisect"])
    assert "--bisect takes an engine, not emoji" in capsys.readouterr().err
    tensorrt(monkeypatch)
    monkeypatch.setattr(engine_check, "find_gpu", lambda: None)
    with pytest.raises(HipaError, match="cannot be bisected here: no NVIDIA GPU"):
        bisect_stage(bundle, STAGE, key_of(bundle))


def test_a_bundle_without_a_reference_is_not_checked(make_bundle):
    bundle = make_bundle(stages=("unet",))
    with pytest.raises(HipaError, match="has no reference tensors"):
        engine_check.stage_reference(bundle, "unet")
