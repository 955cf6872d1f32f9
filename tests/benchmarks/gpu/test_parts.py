"""The parts on a tiny model, on the CPU, through the code that a GPU runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.gpu import backends, costs, gpu_tests, models, torch_inference, training
from benchmarks.gpu.figures import read_part
from benchmarks.gpu.job import TINY_NOTE
from benchmarks.gpu.models import BundleCase
from benchmarks.gpu.torch_inference import COMPILED, EAGER, Case
from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import MODEL
from hipa_deploy.engines.backends.available import Backend
from hipa_deploy.engines.tensorrt import tensorrt_runner
from hipa_deploy.engines.tensorrt.gpu import Gpu
from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner
from hipa_deploy.generate.open_stages import open_runner
from tests.engines.fake_gpu import FakeEngine, FakeGpu
from tests.engines.report_samples import DEVICE


def test_the_costs_are_those_that_the_export_counts_in_its_graphs():
    """Two counts of one model: PyTorch's operators here, ONNX nodes there."""
    bundle = Bundle.open(embedded.BUNDLE)
    found = costs.workload_costs(MODEL, "generate", 1, tiny_decoder=False, precision="fp16")
    exported = costs.bundle_costs(bundle)
    for name in ("text_encoder", "unet"):
        assert found[name].flops == pytest.approx(exported[name].flops, rel=0.03), name
        assert found[name].bytes == pytest.approx(exported[name].bytes, rel=0.1), name
    # The export folds each enlargement of the decoder into the convolution after it.
    decoder = found["vae_decoder"].flops
    assert 0.5 * decoder < exported["vae_decoder"].flops < decoder


def test_the_bound_of_a_stage_is_its_slower_side():
    rates = costs.MeasuredRates(flops_per_second=1e12, bytes_per_second=1e9)
    parts = {"a": costs.StageCost(2 * 10**9, 10**6), "b": costs.StageCost(10**9, 5 * 10**6)}
    assert rates.bound_ms(parts) == pytest.approx(2 + 5)


def test_a_batch_costs_its_operations_each_and_its_weights_once():
    one, eight = (
        costs.workload_costs(MODEL, "edit", batch, tiny_decoder=True, precision="fp32")
        for batch in (1, 8)
    )
    assert eight["unet"].flops == 8 * one["unet"].flops
    assert one["unet"].bytes < eight["unet"].bytes < 2 * one["unet"].bytes
    assert list(one) == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]


@pytest.fixture
def rates_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates as if they had been measured."""
    rates = costs.MeasuredRates(1e12, 1e11)
    for module in (costs, training):
        monkeypatch.setattr(module, "measured_rates", lambda out, precision: rates)


@pytest.mark.slow
@pytest.mark.usefixtures("rates_in")
def test_images_with_pytorch(new_job, monkeypatch):
    cases = (
        Case("generate", EAGER, 1),
        Case("generate", COMPILED, 2, tiny_decoder=True),
        Case("inpaint", EAGER, 1),
    )
    monkeypatch.setattr(torch_inference, "TINY_CASES", cases)
    job = new_job("torch")
    torch_inference.run(job)
    result = read_part(job.out, "torch")
    assert result.left_out == {}
    assert [figure.name for figure in result.figures] == [case.name for case in cases]
    for figure, case in zip(result.figures, cases, strict=True):
        assert figure.per_second == pytest.approx(1e3 * case.batch / figure.stats.p50_ms)
        assert figure.stats.runs >= 5
        assert figure.validity.reasons[-1] != ""
        assert TINY_NOTE in figure.validity.reasons
        assert figure.facts["bound_ms"] > 0

    # What was timed makes images: another one for another prompt.
    call = torch_inference.prepare(job, models.model_folder(job, "tiny"), cases[1])
    first = call(0)
    assert first.shape == (2, 64, 64, 3)
    assert first.dtype == np.uint8
    assert (first != call(1)).any()


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.usefixtures("rates_in")
def test_training_steps_of_both_loops(new_job, monkeypatch):
    monkeypatch.setattr(training, "TINY_CASES", training.TINY_CASES[:2])
    monkeypatch.setattr(training, "DISCARDED", 1)
    job = new_job("training")
    training.run(job)
    result = read_part(job.out, "training")
    assert result.left_out == {}
    ours, plain = result.figures
    assert (ours.engine, plain.engine) == (training.OURS, training.PLAIN)
    assert ours.stats.runs == plain.stats.runs >= 5
    assert ours.facts["gflop_a_step"] == plain.facts["gflop_a_step"]
    assert ours.precision == plain.precision == "bf16"
    assert ours.facts["predicted_fp32_mib"] > 0
    assert ours.facts["share_percent"] > 0
    assert "peak_device_mib" not in ours.facts  # no device took part


def test_the_bound_of_float32_on_a_gpu_is_tf32s():
    gpu = SimpleNamespace(on_gpu=True)
    cpu = SimpleNamespace(on_gpu=False)
    assert training.arithmetic(gpu, "no") == "tf32"
    assert training.arithmetic(cpu, "no") == "fp32"
    assert training.arithmetic(gpu, "bf16") == "bf16"


def link_embedded(job, case: BundleCase) -> Path:
    """The embedded bundle as if it had been exported."""
    folder = models.bundle_folder(job, case)
    shutil.copytree(embedded.BUNDLE, folder, ignore=shutil.ignore_patterns("engines"))
    return folder


@pytest.mark.usefixtures("rates_in")
def test_images_with_a_bundle(new_job):
    job = new_job("backends")
    first, second = models.TINY_BUNDLES
    link_embedded(job, first)
    models_part = new_job("bundles")
    models_part.file.leave_out(second.name, "the export failed: no space")
    backends.run(job)
    result = read_part(job.out, "backends")
    (figure,) = result.figures
    assert figure.name == "generate, onnxruntime, batch 1"
    assert figure.facts["unet_p50_ms"] > 0
    assert figure.facts["share_percent"] > 0
    assert figure.facts["bundle_mib"] > 5
    assert TINY_NOTE in figure.validity.reasons
    assert result.left_out == {
        "inpaint, tiny decoder, onnxruntime, batch 1": (
            "the export failed: no space: it has no bundle"
        )
    }


SMI = {"clocks.sm": "1755", "temperature.gpu": "55", "reasons": "0x0"}


def test_images_with_tensorrt_on_the_strict_fake(new_job, monkeypatch):
    """As on a GPU: engines are built, a graph is captured, the GPU is watched.

    The fakes of TensorRT and CUDA refuse what the real ones refuse. The engines compute with ONNX
    Runtime, so the images are true.
    """
    case = models.TINY_BUNDLES[0]
    job = new_job("backends")
    folder = link_embedded(job, case)
    bundle = Bundle.open(folder)
    runners = {name: open_runner(bundle, name, "onnxruntime") for name in bundle.stages}
    engines = {}
    for name, runner in runners.items():
        engines[name] = FakeEngine(runner.spec, lambda runner=runner, **inputs: runner(**inputs))
        (folder / f"{name}.engine").write_text(name)
    gpu = FakeGpu(engines)
    monkeypatch.setattr(tensorrt_runner, "load_tensorrt", lambda library: gpu.trt)
    monkeypatch.setattr(tensorrt_runner, "load_cudart", lambda library: gpu.cudart)

    def opened(bundle: Bundle, stages, backend: str) -> TensorRTRunner:
        files = [(bundle.stages[name].spec, folder / f"{name}.engine") for name in stages]
        return TensorRTRunner(files, backend)

    built = []
    monkeypatch.setattr("hipa_deploy.engines.store.select.open_engines", opened)
    monkeypatch.setattr(backends, "build_bundle", lambda *args, **more: built.append(more))
    monkeypatch.setattr(backends, "TINY_BACKEND", "tensorrt")
    monkeypatch.setattr(
        "hipa_deploy.engines.latency.machine_state.ask_smi", lambda name, address: SMI
    )
    monkeypatch.setattr("hipa_deploy.engines.latency.machine_state.WATCH_SECONDS", 0.01)
    card = Gpu(name="H100", sm=90, memory_mib=80000, integrated=False, driver="1", cuda="13.0")
    usable = Backend(name="tensorrt", version="10", usable=True, remedy=None)
    absent = Backend(name="onnxruntime-cuda", version=None, usable=False, remedy="Run: pip")
    machine = DEVICE.model_copy(update={"gpu": card, "backends": (usable, absent)})
    monkeypatch.setattr("benchmarks.gpu.job.describe_device", lambda: machine)
    on_gpu = SimpleNamespace(**vars(job) | {"on_gpu": True})
    on_gpu.machine = machine
    on_gpu.effort = job.effort
    on_gpu.notes = job.notes
    on_gpu.release = lambda: None

    backends.run(on_gpu)
    result = read_part(job.out, "backends")
    (figure,) = result.figures
    assert figure.engine == "tensorrt"
    assert [options["backend"] for options in built] == ["tensorrt"]
    assert figure.facts["cuda_graph"] == "yes"
    assert figure.facts["build_seconds"] >= 0
    assert figure.validity.steadiness.clock_high_mhz == 1755
    assert figure.validity.steadiness.readings > 0
    assert gpu.cudart.leaks == []
    for runner in runners.values():
        runner.close()


def test_a_backend_that_is_not_there_is_left_out_with_its_remedy(new_job, monkeypatch):
    job = new_job("backends")
    remedy = "Run: pip install onnxruntime"
    backend = Backend(name="onnxruntime", version=None, usable=False, remedy=remedy)
    machine = DEVICE.model_copy(update={"backends": (backend,)})
    monkeypatch.setattr("benchmarks.gpu.job.describe_device", lambda: machine)
    backends.run(job)
    assert set(read_part(job.out, "backends").left_out.values()) == {remedy}


@pytest.mark.thorough
@pytest.mark.slow
def test_a_bundle_is_exported_and_a_failure_is_the_last_line(new_job, monkeypatch):
    good = BundleCase("good", "generate", 1)
    bad = BundleCase("bad", "generate", 1000)
    monkeypatch.setattr(models, "TINY_BUNDLES", (good, bad))
    job = new_job("bundles")
    models.run(job)
    result = read_part(job.out, "bundles")
    assert result.facts["good_seconds"] > 0
    assert Bundle.open(models.bundle_folder(job, good)).manifest.task == "generate"
    assert "batch 1000 is out of range" in result.left_out.pop("bad")
    assert result.left_out == {}


def test_exports_stop_at_the_deadline(new_job):
    job = new_job("bundles", seconds=0.5)
    models.run(job)
    assert not read_part(job.out, "bundles").complete
    assert not any((job.work / "bundles").glob("*/hipa.json"))


def test_without_the_packages_of_an_export_there_is_none(new_job, monkeypatch):
    monkeypatch.setattr(models, "missing", lambda extra: ["onnx", "onnxscript"])
    job = new_job("bundles")
    models.run(job)
    reasons = set(read_part(job.out, "bundles").left_out.values())
    assert reasons == {"onnx, onnxscript is not installed"}


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="no"/></testcase>
<testcase classname="tests.b" name="broken"><error message="no"/></testcase>
<testcase classname="tests.b" name="away"><skipped message="no GPU"/></testcase>
<testcase classname="tests.b" name="gone"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_the_tests_are_counted_by_outcome(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert gpu_tests.count(tmp_path / "junit.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 2,
        "failed_tests": "tests.a::bad, tests.b::broken",
        "skipped_because": "no GPU",
    }


def test_the_marked_files_are_found():
    files = gpu_tests.marked_files()
    assert "tests/engines/test_runtime_gpu.py" in files
    assert all("mark.gpu" in (gpu_tests.ROOT / name).read_text() for name in files)


def test_the_facts_of_a_part_keep_whole_numbers(new_job):
    job = new_job("tests")
    job.file.facts["passed"] = 3
    job.file.save()
    stored = json.loads((job.out / "tests.json").read_text())
    assert stored["facts"] == {"passed": 3}
    assert isinstance(read_part(job.out, "tests").facts["passed"], int)
