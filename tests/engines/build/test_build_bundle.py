"""Real TensorRT-RTX builds of tiny graphs, without a GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from polygraphy.backend import trt as polygraphy_trt
from rich.console import Console

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Axis, StageSpec
from hipa_deploy.engines.build import build_bundle as build_module
from hipa_deploy.engines.build import build_stage as build_stage_module
from hipa_deploy.engines.build import worker as build_worker
from hipa_deploy.engines.build.build_bundle import build_bundle, dry_run, locked
from hipa_deploy.engines.build.worker import Job
from hipa_deploy.engines.build.worker_process import run_worker
from hipa_deploy.engines.store.sidecar import read_sidecar
from hipa_deploy.engines.targets import memory_needs
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, load_target_profile
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.errors import HipaError, MissingDependencyError
from tests.engines.engine_samples import RTX_4090

trt = pytest.importorskip("tensorrt_rtx")
no_gpu = pytest.mark.skipif(find_gpu() is not None, reason="a GPU is here")
QUIET = Console(file=io.StringIO())


def build(bundle, **more):
    return build_bundle(bundle, backend="rtx", console=QUIET, **more)


def names(folder: Path) -> list[str]:
    """The names of the files in ``folder`` and below, without the lock."""
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if name != ".lock")


@no_gpu
def test_builds_every_stage_then_finds_them_up_to_date(make_bundle):
    bundle = make_bundle()
    built = build(bundle)
    assert [(engine.stage, engine.up_to_date) for engine in built] == [
        ("unet", False),
        ("vae_decoder", False),
    ]
    for engine in built:
        assert engine.path.parent == bundle.root / "engines" / "rtx-portable"
        assert engine.path.stat().st_size == engine.sidecar.engine_bytes > 10_000
        assert engine.sidecar == read_sidecar(engine.path.with_suffix(".json"))
        assert engine.sidecar.key.compute_capabilities == (86, 89, 120)
        assert engine.sidecar.precision_check.by == "network types"
        assert engine.sidecar.precision_check.float16 == 1
        assert engine.sidecar.build_peak_mib > 50
    assert built[1].sidecar.key.external_sha256 == (
        bundle.manifest.files["vae_decoder/model.onnx.data"],
    )
    before = names(bundle.root / "engines")
    again = build(bundle)
    assert all(engine.up_to_date for engine in again)
    assert names(bundle.root / "engines") == before


def test_what_is_up_to_date_may_be_read_only(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    (built,) = build(bundle, target="rtx40")

    def refuse(folder):
        raise AssertionError(f"{folder} is written")

    # Root may write to every folder, so the system's answer is invented.
    monkeypatch.setattr(build_module.os, "access", lambda path, mode: False)
    monkeypatch.setattr(build_module, "locked", refuse)
    again = [dataclasses.replace(built, up_to_date=True)]
    assert build(bundle, target="rtx40") == again
    with pytest.raises(AssertionError, match="is written"):
        build(bundle, target="rtx50")

    # Engines for another GPU are no rivals, whole or damaged.
    monkeypatch.undo()
    (other,) = build(bundle, target="rtx50")
    other.path.with_suffix(".json").write_text("{}")
    assert build(bundle, target="rtx40") == again
    build(bundle, target="rtx50", force=True)
    monkeypatch.setattr(build_module.os, "access", lambda path, mode: False)
    monkeypatch.setattr(build_module, "locked", refuse)
    assert build(bundle, target="rtx40") == again
    assert build(bundle, target="rtx50")[0].up_to_date


def test_options_reach_the_builder_and_the_key(make_bundle):
    bundle = make_bundle(stages=("unet",))
    options = BuildOptions(
        optimization_level=0, workspace_mib=64, tactic_dram_mib=2048, max_aux_streams=0
    )
    (first,) = build(bundle, target="rtx40", options=options)
    (second,) = build(bundle, target="rtx40", options=BuildOptions(optimization_level=1))
    assert first.sidecar.key.options == options
    assert first.path.parent.name == "rtx-rtx40"
    assert first.path.name != second.path.name
    assert first.path.is_file()


@no_gpu
def test_a_refittable_engine_needs_a_driver(make_bundle):
    bundle = make_bundle(stages=("unet",))
    with pytest.raises(HipaError, match="--refit: compiling a refittable engine needs a driver"):
        build(bundle, target="rtx40", options=BuildOptions(refit=True))
    assert not (bundle.root / "engines").exists()


def test_a_refittable_engine_of_a_faulty_version_is_refused(make_bundle, monkeypatch):
    faulty = SimpleNamespace(__version__="11.3.0.4")
    monkeypatch.setattr(build_module, "check_tools", lambda backend: ("tensorrt", faulty))
    options = BuildOptions(refit=True)
    with pytest.raises(HipaError, match=r"tensorrt 11\.3\.0\.4 cannot swap adaptors"):
        build_bundle(make_bundle(), backend="tensorrt", options=options, console=QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver")
def test_a_refittable_engine_is_another_engine(make_bundle):
    bundle = make_bundle(stages=("unet",))
    (plain,) = build(bundle)
    (refittable,) = build(bundle, options=BuildOptions(refit=True))
    assert refittable.sidecar.key.options.refit
    assert refittable.path.read_bytes() != plain.path.read_bytes()


def test_what_cannot_fit_is_refused_before_anything_is_written(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    monkeypatch.setattr(memory_needs, "available_memory_mib", lambda: 100)
    message = r"building: memory on this machine takes about \d+ MiB \(available: 100 MiB\)"
    with pytest.raises(HipaError, match=message):
        build(bundle, target="rtx40")
    assert not (bundle.root / "engines").exists()

    # With --force it is built, and then nothing is left to build that could fail to fit.
    (built,) = build(bundle, target="rtx40", force=True)
    assert build(bundle, target="rtx40") == [dataclasses.replace(built, up_to_date=True)]


@pytest.mark.parametrize("target", ["auto", "orin-nano"])
def test_a_dry_run_needs_neither_tensorrt_nor_the_device(make_bundle, target):
    bundle = make_bundle()
    plan = dry_run(bundle, backend="tensorrt", target=target)
    assert [stage.stage for stage in plan.stages] == ["unet", "vae_decoder"]
    assert not (bundle.root / "engines").exists()


def test_a_dry_run_uses_the_options_of_the_target_by_default(make_bundle):
    bundle = make_bundle(stages=("unet",))
    default = dry_run(bundle, backend="tensorrt", target="orin-nano")
    options = BuildOptions(workspace_mib=5)
    small = dry_run(bundle, backend="tensorrt", target="orin-nano", options=options)
    workspace_mib = load_target_profile("orin-nano").build.workspace_mib
    saved_mib = default.stages[0].build_gpu - small.stages[0].build_gpu
    assert len(default.stages) == len(small.stages) == 1
    assert saved_mib == workspace_mib - 5


@no_gpu
@pytest.mark.parametrize(
    ("best_of", "message"), [(0, "is 0. Expected 1 to 20"), (3, "no NVIDIA GPU was found")]
)
def test_best_of_needs_a_gpu(make_bundle, best_of, message):
    with pytest.raises(HipaError, match=message):
        build(make_bundle(), best_of=best_of)


def test_the_fastest_of_several_is_kept(make_bundle, monkeypatch):
    """Real builds with invented timings, because timing needs a GPU."""
    bundle = make_bundle(stages=("unet",))
    latencies = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(build_module, "find_gpu", lambda: RTX_4090)
    monkeypatch.setattr(
        build_stage_module, "time_engine", lambda path, spec, library: next(latencies)
    )
    (built,) = build(bundle, target="rtx40", best_of=3)
    assert built.sidecar.candidates_ms == (3.0, 1.0, 2.0)
    assert [name for name in names(bundle.root / "engines") if name.endswith(".tmp")] == []
    (again,) = build(bundle, target="rtx40", best_of=2)
    assert again.up_to_date


def test_a_damaged_engine_is_built_again(make_bundle):
    bundle = make_bundle(stages=("unet",))
    (first,) = build(bundle, target="rtx40")
    first.path.write_bytes(first.path.read_bytes()[:-1])
    (second,) = build(bundle, target="rtx40")
    assert not second.up_to_date
    assert second.path == first.path


@pytest.mark.parametrize(
    ("dtype", "requested", "found"), [(np.float32, "fp16", "fp32"), (np.float16, "fp32", "fp16")]
)
def test_a_graph_of_another_precision_is_refused(make_bundle, dtype, requested, found):
    bundle = make_bundle(dtype=dtype, precision=requested, stages=("unet",))
    message = (
        rf"^unet: the ONNX graph is not {requested}: 1 of 1 .* are {found}.*--dtype {requested}"
    )
    with pytest.raises(HipaError, match=message):
        build(bundle, target="rtx40")
    assert names(bundle.root / "engines") == []


def test_a_stage_whose_export_left_most_of_it_in_float32_is_built(make_bundle):
    """As the export does with a decoder whose values do not fit into FP16."""
    bundle = make_bundle(dtype=np.float32, precision="fp16", stages=("unet",))
    (stage,) = bundle.manifest.stages
    stage = stage.model_copy(update={"fp32_islands": ("unet.conv_in",)})
    manifest = bundle.manifest.model_copy(update={"stages": (stage,)})
    (built,) = build(Bundle(bundle.root, manifest), target="rtx40")
    check = built.sidecar.precision_check
    assert (check.float16, check.float32) == (0, 1)


def test_an_operator_tensorrt_does_not_know_is_named(make_bundle):
    bundle = make_bundle(dtype=np.float32, precision="fp32", op="Det", stages=("unet",))
    with pytest.raises(HipaError, match=r"unet: .*Det") as caught:
        build(bundle, target="rtx40")
    assert "\n" not in str(caught.value)
    assert names(bundle.root / "engines") == []


def test_a_corrupt_bundle_is_not_built(make_bundle):
    bundle = make_bundle()
    bundle.stage_path("unet").write_bytes(b"x")
    with pytest.raises(HipaError, match="corrupt"):
        build(bundle)
    assert not (bundle.root / "engines").exists()


def test_named_axes_become_a_profile(make_bundle, tmp_path):
    bundle = make_bundle(stages=("unet",))
    path = bundle.stage_path("unet")
    spec = bundle.stages["unet"].spec

    # The batch of the graph and of its description gets a name.
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)
    named = {"shape": ("batch", 4, 8, 8)}
    x = spec.inputs[0].model_copy(update=named)
    y = spec.outputs[0].model_copy(update=named)
    axes = {"batch": Axis(min=1, opt=2, max=4)}
    job = Job(
        library="rtx",
        onnx=path,
        spec=StageSpec(name="unet", inputs=(x,), outputs=(y,), axes=axes),
        out=tmp_path / "out",
        precision="fp16",
        compute_capabilities=(89,),
        options=BuildOptions(),
        timing_cache=None,
    )

    run_worker(job, lambda event: None)
    assert (tmp_path / "out").stat().st_size > 10_000
    (profile,) = build_worker._profiles(polygraphy_trt, job.spec)
    assert [shape[0] for shape in profile["x"]] == [1, 2, 4]
    assert build_worker._profiles(polygraphy_trt, spec) is None


def test_a_timing_cache_is_refused_for_tensorrt_rtx(make_bundle, tmp_path):
    with pytest.raises(HipaError, match="TensorRT-RTX has no timing cache"):
        build(make_bundle(), options=BuildOptions(timing_cache=tmp_path / "cache"))


def test_a_cache_folder_that_cannot_be_written_costs_the_timings_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where the folder goes")
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "file"))
    goal = Target(name="orin-sm87", compute_capabilities=(87,))
    with pytest.warns(RuntimeWarning, match="timings of kernels are not kept.*HIPA_CACHE"):
        options = build_module._resolve_options(
            BuildOptions(), "tensorrt", "orin-nano", goal, "10.3.0"
        )
    assert options.timing_cache is None
    assert options.workspace_mib == 1024
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path))
    options = build_module._resolve_options(BuildOptions(), "tensorrt", "auto", goal, "10.3.0")
    assert options.timing_cache == tmp_path / "timing" / "orin-sm87-trt10.3.0.cache"


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_no_timing_cache_is_refused_and_a_missing_one_is_created(tmp_path):
    config = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_builder_config()
    path = tmp_path / "caches" / "new.cache"
    for _ in range(2):  # the file is missing at first, and then it is the one just written
        build_worker._load_timing_cache(config, path)
        build_worker._save_timing_cache(config, path)
    path.write_bytes(b"somebody's photograph")
    with pytest.raises(HipaError, match=r"new\.cache is not a timing cache of this device"):
        build_worker._load_timing_cache(config, path)
    assert path.read_bytes() == b"somebody's photograph"


def test_two_builds_at_once_are_refused(make_bundle):
    bundle = make_bundle(stages=("unet",))
    code = "import sys, time\nfrom pathlib import Path\n"
    code += "from hipa_deploy.engines.build.build_bundle import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    folder = bundle.root / "engines" / "rtx-rtx40"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HipaError, match=rf"engines .*: process {other.pid} .* is writing"):
            build(bundle, target="rtx40")
        other.kill()
    with locked(folder):  # a lock whose holder died is free
        assert f"process {os.getpid()} " in (folder / ".lock").read_text()
    assert names(folder) == []


def test_a_folder_that_cannot_be_written_is_an_error(make_bundle):
    bundle = make_bundle()
    (bundle.root / "engines").write_text("a file where the folder goes")
    with pytest.raises(HipaError, match="cannot be written"):
        build(bundle)


def test_a_lock_deletes_the_scratch_files_of_a_killed_build(tmp_path):
    (tmp_path / ".unet-0.engine.tmp").write_bytes(b"half")
    with locked(tmp_path):
        assert names(tmp_path) == []


def test_interrupting_stops_the_worker_and_leaves_nothing(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    workers = []
    popen = subprocess.Popen

    def start(*args, **more):
        workers.append(popen(*args, **more))
        return workers[-1]

    monkeypatch.setattr(subprocess, "Popen", start)

    def interrupt(event):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_reporter", lambda bar, task, number, best_of: interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, target="rtx40")
    assert workers[-1].poll() is not None
    assert names(bundle.root / "engines") == []


def test_ctrl_c_in_the_terminal_stops_a_whole_build(make_bundle):
    bundle = make_bundle(stages=("unet",))
    code = "import sys\nfrom pathlib import Path\nfrom hipa_deploy.bundle.folder import Bundle\n"
    code += "from hipa_deploy.engines.build.build_bundle import build_bundle\n"
    code += "build_bundle(Bundle.open(Path(sys.argv[1])), backend='rtx', target='rtx40')"
    folder = bundle.root / "engines"
    command = [sys.executable, "-c", code, str(bundle.root)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        # The lock shows that the build has begun.
        while not (folder / "rtx-rtx40" / ".lock").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert process.returncode != 0
    assert [name for name in names(folder) if name.endswith(".tmp")] == []


def test_missing_packages_give_the_pip_command(make_bundle, monkeypatch):
    bundle = make_bundle(stages=("unet",))
    message = r"tensorrt is not installed.*hipa-deploy\[tensorrt\]"
    with pytest.raises(MissingDependencyError, match=message):
        build_bundle(bundle, backend="tensorrt", console=QUIET)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"polygraphy.*hipa-deploy\[rtx\]"):
        build(bundle)

    message = r"'onnxruntime' has no engines. Expected one of: tensorrt, rtx"
    with pytest.raises(HipaError, match=message):
        build_bundle(bundle, backend="onnxruntime", console=QUIET)


def test_the_worker_never_loads_torch_or_onnx(make_bundle):
    code = "import sys, hipa_deploy.engines.build.worker, polygraphy.backend.trt\n"
    code += "print([n for n in ('torch', 'onnx', 'diffusers', 'transformers') if n in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
