"""A fake GPU with engines of a whole bundle, which compute with ONNX Runtime on the CPU."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import onnxruntime

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.onnx_weights import with_values
from hipa_deploy.engines.store import low_memory, select
from hipa_deploy.engines.tensorrt import tensorrt_runner
from tests.engines import fake_refit
from tests.engines.engine_samples import ORIN, put_engine
from tests.engines.fake_gpu import FakeEngine, FakeGpu

ACTIVATIONS = {
    "text_encoder": 40_000,
    "unet": 900_000,
    "vae_decoder": 3_000_000,
    "teacher": 1_000_000,
}


class BundleGpu(FakeGpu):
    """Engines of ``bundle``, made anew whenever one is deserialised, as a real one is.

    Attributes:
        loads: what was deserialised, in order.
        at_load: with each, the runners that were there then: one stream each.

    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__({})
        self.bundle = bundle
        self.loads: list[str] = []
        self.at_load: list[int] = []
        for stage in bundle.all_stages:
            content = stage.encode()
            put_engine(bundle, stage, content=content, activations=ACTIVATIONS[stage])

    def install(self, monkeypatch) -> None:
        """Put this in the place of TensorRT, CUDA and the GPU."""
        for module in (select, low_memory):
            monkeypatch.setattr(module, "find_gpu", lambda: ORIN)
            monkeypatch.setattr(module, "load_tensorrt", lambda library: self.trt)
        for module in (tensorrt_runner, low_memory):
            monkeypatch.setattr(module, "load_cudart", lambda library: self.cudart)
        monkeypatch.setattr(tensorrt_runner, "load_tensorrt", lambda library: self.trt)

    @property
    def trt(self):
        trt = super().trt
        trt.__version__ = "10.13.3"
        trt.Refitter = fake_refit.FakeRefitter
        return trt

    def _deserialise(self, logger, data: bytes):
        stage = data.decode()
        self.loads.append(stage)
        self.at_load.append(len(self.cudart.streams))
        self.engines[stage] = _engine(self.bundle, stage)
        return super()._deserialise(logger, data)


@lru_cache(maxsize=4)
def _session(content: bytes) -> onnxruntime.InferenceSession:
    """A session; of the stages of the bundle one each for all tests, as opening one takes time."""
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def _with(path: Path, weights: fake_refit.FakeEngine) -> bytes:
    values = {}
    for name, value in weights.weights.items():
        values[name] = value.reshape(weights.shapes[name])
    return with_values(path, values)[0]


def _engine(bundle: Bundle, stage: str) -> FakeEngine:
    """An engine with the stage's own weights, which can be refitted."""
    path = bundle.stage_path(stage)
    weights = fake_refit.FakeEngine(path)
    # Refitting replaces the arrays, and then the engine is another.
    own = tuple(map(id, weights.weights.values()))
    refitted: dict[tuple[int, ...], onnxruntime.InferenceSession] = {}

    def compute(**inputs):
        version = tuple(map(id, weights.weights.values()))
        if version == own:
            session = _session(path.read_bytes())
        else:
            if version not in refitted:
                refitted[version] = _session.__wrapped__(_with(path, weights))
            session = refitted[version]
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    engine = FakeEngine(bundle.all_stages[stage].spec, compute, activations=ACTIVATIONS[stage])
    for name in ("weights", "refittable", "fail", "wants"):
        setattr(engine, name, getattr(weights, name))
    return engine
