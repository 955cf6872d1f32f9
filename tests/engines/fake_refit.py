"""A fake of TensorRT for refitting: its engine is a dictionary of weights.

It refuses what the documentation of IRefitter says TensorRT refuses: a name that is not refittable,
another type or size, and a refit with weights missing.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from hipa_deploy.bundle.onnx_weights import read_initializers


class FakeEngine:
    """An engine built from ``onnx_path``, with all its floating-point weights by name.

    ``fixed``: weights that were not marked as refittable. ``inner``: weights of TensorRT's own.
    ``fail``: refitting fails half way. ``wants``: weights that TensorRT asks for in any case.
    """

    def __init__(
        self, onnx_path: Path, refittable=True, fixed=(), inner=(), fail=False, wants=()
    ) -> None:
        self.refittable = refittable
        self.fail = fail
        self.wants = wants
        self.weights = {}
        self.shapes = {}
        for name, weight in read_initializers(onnx_path).items():
            if weight.dtype.startswith("float") and name not in fixed:
                self.weights[name] = weight.read().reshape(-1)
                self.shapes[name] = weight.shape
        for name in inner:
            self.weights[name] = np.ones(2, np.float32)


class FakeRefitter:
    def __init__(self, engine: FakeEngine, logger) -> None:
        self.engine = engine
        self.logger = logger
        self.values = {}

    def get_all_weights(self):
        return list(self.engine.weights)

    def get_weights_prototype(self, name):
        weight = self.engine.weights.get(name)
        return SimpleNamespace(size=-1 if weight is None else weight.size, dtype=str(weight.dtype))

    def set_named_weights(self, name, array):
        known = self.engine.weights.get(name)
        if (
            known is None
            or array.dtype != known.dtype
            or array.size != known.size
            or array.ndim != 1
        ):
            self.logger.log(1, f"{name} rejected")
            return False
        self.values[name] = array
        return True

    def get_missing_weights(self):
        return [name for name in self.engine.wants if name not in self.values]

    def refit_cuda_engine(self):
        if self.engine.fail:
            self.logger.log(1, "out of memory")
            return False
        # As TensorRT, it reads the arrays only now.
        for name, array in self.values.items():
            self.engine.weights[name] = array.copy()
        return True


class FakeILogger:
    """Nothing of TensorRT's logger but its place in the class tree."""


def fake_trt(version: str = "10.16.1") -> ModuleType:
    """A module with what refitting uses of TensorRT."""
    trt = ModuleType("fake_tensorrt")
    trt.__version__ = version
    trt.Refitter = FakeRefitter
    trt.ILogger = FakeILogger
    trt.nptype = np.dtype
    trt.Logger = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)
    return trt


def assert_weights(engine: FakeEngine, onnx_path: Path, changed: dict[str, np.ndarray]) -> None:
    """Every weight of ``engine`` is that of ``changed``, or else the ONNX file's own."""
    own = read_initializers(onnx_path)
    for name, value in engine.weights.items():
        expected = changed[name] if name in changed else own[name].read()
        np.testing.assert_array_equal(value, expected.reshape(-1))
