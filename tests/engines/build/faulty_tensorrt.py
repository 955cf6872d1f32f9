"""A TensorRT that builds wrong engines: ONNX Runtime behind the fakes of CUDA and TensorRT.

``FaultyTensorRT.run_worker`` stands for the build worker. Its engines run on the fakes of
tests/engines/fake_gpu.py through the real runner, with the outputs that a real engine would have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnxruntime

from hipa_deploy.bundle.onnx_weights import read_initializers, with_values
from hipa_deploy.engines.build import best_of, build_stage, engine_check, suspects
from hipa_deploy.engines.build.worker import Job, Outcome
from hipa_deploy.engines.faults.island import widen
from hipa_deploy.engines.faults.onnx_graph import more_outputs
from hipa_deploy.engines.store.sidecar import PrecisionCheck
from hipa_deploy.engines.tensorrt import tensorrt_runner
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import ORIN
from tests.engines.fake_gpu import FakeEngine, FakeGpu


class FaultyTensorRT:
    """Builds engines of which some have wrong weights.

    Args:
        wrong_weights: of a job, what its engine has with another sign.
        fails: whether the build of a job fails.
        fused: how many attentions its inspector would name.

    Attributes:
        jobs: every job, in order.

    """

    def __init__(
        self,
        wrong_weights: Callable[[Job], Collection[str]],
        fails: Callable[[Job], bool] = lambda job: False,
        fused: int | None = None,
    ) -> None:
        self.wrong_weights = wrong_weights
        self.fails = fails
        self.fused = fused
        self.jobs: list[Job] = []
        self.gpu = FakeGpu({})

    def install(self, monkeypatch, gpu=ORIN) -> None:
        """Put this in the place of TensorRT, the worker and the GPU."""
        for module in (build_stage, suspects):
            monkeypatch.setattr(module, "run_worker", self.run_worker)
        monkeypatch.setattr(engine_check, "find_gpu", lambda: gpu)
        monkeypatch.setattr(engine_check, "load_cudart", lambda library: self.gpu.cudart)
        monkeypatch.setattr(tensorrt_runner, "load_tensorrt", lambda library: self.gpu.trt)
        monkeypatch.setattr(tensorrt_runner, "load_cudart", lambda library: self.gpu.cudart)
        monkeypatch.setattr(best_of, "RUNS", 1)
        monkeypatch.setattr(best_of, "WARMUP", 1)

    def run_worker(self, job: Job, report) -> Outcome:
        self.jobs.append(job)
        if self.fails(job):
            raise HipaError("could not find any implementation for node conv.")
        content = job.onnx.read_bytes()
        weights = read_initializers(job.onnx)
        wrong = {name: -weights[name].read() for name in self.wrong_weights(job)}
        if wrong:
            content, _ = with_values(job.onnx, wrong)
        if job.fp32:
            content = widen(content, job.fp32)
        content += more_outputs(job.mark)
        name = f"engine {len(self.jobs)}"
        self.gpu.engines[name] = self._engine(job, content)
        job.out.write_text(name)
        return Outcome(
            seconds=1.0,
            peak_mib=1,
            precision_check=PrecisionCheck(by="inspector", float16=1, float32=0),
            fused_attentions=self.fused,
        )

    def _engine(self, job: Job, content: bytes) -> FakeEngine:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]

        def compute(**inputs: np.ndarray) -> dict[str, np.ndarray]:
            return dict(zip(outputs, session.run(outputs, inputs), strict=True))

        marked = {}
        for output in session.get_outputs():
            if output.name in job.mark:
                kind = output.type.removeprefix("tensor(").removesuffix(")")
                dtype = {"float16": "float16", "float": "float32"}[kind]
                marked[output.name] = (dtype, tuple(output.shape))
        return FakeEngine(job.spec, compute, **marked)
