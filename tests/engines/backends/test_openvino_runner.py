"""OpenVINO for real, on the CPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands.options import BackendOption
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner
from hipa_deploy.engines.backends.openvino_runner import OpenVinoRunner, core, load_openvino
from hipa_deploy.errors import HipaError, MissingDependencyError
from hipa_deploy.generate.open_stages import open_runner
from hipa_deploy.generate.runner import BACKENDS
from tests.engines.engine_samples import SHAPE
from tests.threads import in_threads

X = {"x": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}


@pytest.mark.parametrize(("dtype", "precision"), [(np.float32, "fp32"), (np.float16, "fp16")])
def test_gives_what_onnxruntime_gives(make_bundle, dtype, precision):
    pytest.importorskip("openvino")
    bundle = make_bundle(dtype, precision)
    path = bundle.stage_path("unet")
    spec = bundle.stages["unet"].spec
    with OpenVinoRunner(path, spec) as ours, OnnxRuntimeRunner(path, spec, "onnxruntime") as other:
        first = ours(**X)["y"]
        tolerance = 2e-2 if precision == "fp16" else 1e-5
        np.testing.assert_allclose(first, other(**X)["y"], atol=tolerance)
        again = ours(**X)["y"]
        again[...] = 0  # the array is the caller's: this must not change the next result
        np.testing.assert_array_equal(ours(**X)["y"], first)


def test_the_embedded_bundle_passes_its_gates():
    pytest.importorskip("openvino")
    assert check_bundle(Bundle.open(BUNDLE), "openvino").problems == ()


def has_bf16() -> bool:
    openvino = pytest.importorskip("openvino")
    return "BF16" in core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_bfloat16_passes_the_gates_where_the_cpu_has_it():
    if not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    exact = check_bundle(Bundle.open(BUNDLE), "openvino")
    rounded = check_bundle(Bundle.open(BUNDLE), "openvino-bf16")
    assert rounded.problems == ()
    # Clearly worse: it is not FP32 by another name.
    assert rounded.end_to_end.parity.psnr_db < exact.end_to_end.parity.psnr_db - 3


def test_bfloat16_is_refused_where_the_cpu_lacks_it(make_bundle, monkeypatch):
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(
        HipaError,
        match=r"openvino-bf16: This CPU has no bfloat16 arithmetic\. Use --backend openvino\.",
    ):
        open_runner(make_bundle(), "unet", "openvino-bf16")


CTRL_C_AFTER_TWO = """
import os, signal, sys
from pathlib import Path
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.backends.openvino_runner import OpenVinoRunner

bundle = Bundle.open(Path(sys.argv[1]))
path = bundle.stage_path("unet")
spec = bundle.stages["unet"].spec
first = OpenVinoRunner(path, spec)
second = OpenVinoRunner(path, spec)
first.close()
second.close()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_two_runners_that_closed_in_the_order_they_came(make_bundle):
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", CTRL_C_AFTER_TWO, str(make_bundle().root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_the_pipeline_says_which_backend_it_was():
    pytest.importorskip("openvino")
    with OneStepPipeline.load("emoji", "openvino") as pipe:
        assert pipe("3d emoji of a red apple").parameters[0]["backend"] == "openvino"


def test_a_closed_runner_and_wrong_inputs_are_refused(make_bundle):
    pytest.importorskip("openvino")
    bundle = make_bundle()
    runner = OpenVinoRunner(bundle.stage_path("unet"), bundle.stages["unet"].spec)
    with pytest.raises(HipaError, match=r"unet: input x is float64"):
        runner(x=X["x"].astype(np.float64))
    runner.close()
    runner.close()
    with pytest.raises(HipaError, match="unet: the runner is closed"):
        runner(**X)


def test_a_file_that_is_no_graph_is_one_line(make_bundle):
    pytest.importorskip("openvino")
    bundle = make_bundle()
    path = bundle.stage_path("unet")
    path.write_bytes(b"no graph")
    with pytest.raises(HipaError, match=r"model\.onnx: OpenVINO cannot compile it: .+") as caught:
        OpenVinoRunner(path, bundle.stages["unet"].spec)
    assert "\n" not in str(caught.value)


def test_help_names_every_backend():
    help_text = BackendOption.__metadata__[0].help
    names = help_text.split(": ")[1].split(". ")[0]
    assert names.split(" | ") == list(BACKENDS)


def test_absent_it_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingDependencyError, match=r"openvino is not installed.*hipa-deploy\[openvino\]"
    ):
        OneStepPipeline.load("emoji", "openvino")


def test_broken_it_says_so(monkeypatch):
    def fail(name):
        raise ImportError("no libopenvino.so")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(HipaError, match=r"openvino does not load \(no libopenvino.so\)"):
        load_openvino()


def test_eight_threads_that_come_first_get_one_core():
    class Library:
        made = 0

        def Core(self) -> object:
            self.made += 1
            time.sleep(0.01)
            return object()

    library = Library()
    assert len(set(in_threads(lambda number: core(library)))) == 1
    assert library.made == 1


def test_its_import_sends_nothing(tmp_path: Path) -> None:
    """With telemetry it makes an identifier of the machine at once, and sends it with an event."""
    pytest.importorskip("openvino")
    environment = {**os.environ, "HOME": str(tmp_path)}
    # OpenVINO sends nothing from a continuous integration.
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):
        environment.pop(name, None)
    code = (
        "import os; from hipa_deploy.engines.backends.openvino_runner import load_openvino\n"
        "load_openvino(); load_openvino()\n"
        "import openvino_telemetry  # which others may still import\n"
        "os._exit(0)  # without waiting for a sender\n"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert list(tmp_path.rglob("*")) == []
