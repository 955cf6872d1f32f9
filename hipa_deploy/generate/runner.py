"""Runners: a stage as a callable, whatever computes it.

``open_runner`` is the one place that knows the backends. A backend that was asked for and cannot run is an
error, never another backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from hipa_deploy.bundle.manifest import Bundle, StageSpec
from hipa_deploy.errors import HipaError

CPU_BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
BACKENDS = ("auto", *CPU_BACKENDS, "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "rtx")
ENGINE_BACKENDS = ("tensorrt", "rtx")


class Runner(Protocol):
    """One stage, loaded. Owns its device memory until ``close``."""

    spec: StageSpec

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name. Inputs must have the names, dtypes and shapes of ``spec``."""

    def close(self) -> None:
        """Release device memory. Calling it twice is harmless."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Chain(Protocol):
    """Every stage on one device: what a stage gives is what the next one takes, without leaving it."""

    def run(
        self, inputs: dict[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the stages whose outputs are not among ``inputs``; the ``outputs`` asked for, or the last stage's."""

    def run_device(self, **inputs: np.ndarray) -> dict[str, Any]:
        """The last stage's outputs as device arrays, valid until the next run."""

    def close(self) -> None:
        """Release device memory. Calling it twice is harmless."""


def check_backend(backend: str) -> None:
    """Raise HipaError for a name that is not in ``BACKENDS``."""
    if backend not in BACKENDS:
        raise HipaError(f"backend {backend!r} is unknown. Expected one of: {', '.join(BACKENDS)}.")


def resolve_backend(backend: str, bundle: Bundle) -> str:
    """Turn 'auto' into a backend's name: an engine that is built for this device, else ONNX Runtime on the CPU."""
    if backend != "auto":
        return backend
    from hipa_deploy.engines.store.select import runnable_flavour

    return runnable_flavour(bundle) or "onnxruntime"


def open_runner(bundle: Bundle, stage: str, backend: str) -> Runner:
    """Load one stage on one backend (not 'auto').

    Raises:
        HipaError: the backend is not installed, or no engine fits this device; the message says what to run.

    """
    if backend.startswith("openvino"):
        from hipa_deploy.engines.backends.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(bundle.stage_path(stage), bundle.stages[stage].spec, backend)
    if backend.startswith("onnxruntime"):
        from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache

        cache = engine_cache(bundle, stage) if backend == "onnxruntime-tensorrt" else None
        return OnnxRuntimeRunner(
            bundle.stage_path(stage), bundle.stages[stage].spec, backend, cache=cache
        )
    from hipa_deploy.engines.store.select import open_engine

    return open_engine(bundle, stage, backend)


def open_stages(bundle: Bundle, backend: str) -> tuple[dict[str, Runner], Chain | None]:
    """Load every stage on one backend (not 'auto'): a runner each, and the chain of them where there is one.

    TensorRT chains the stages of the onestep layout. The generic one has arithmetic of ours between its stages.

    Raises:
        HipaError: as ``open_runner`` does. Stages that were loaded are released.

    """
    if backend not in ENGINE_BACKENDS or bundle.manifest.layout != "onestep":
        with ExitStack() as stack:
            runners = {
                stage: stack.enter_context(open_runner(bundle, stage, backend))
                for stage in bundle.stages
            }
            stack.pop_all()
        return runners, None
    from hipa_deploy.engines.store.select import open_engines

    chain = open_engines(bundle, bundle.stages, backend)
    return {stage: chain.stage(stage) for stage in bundle.stages}, chain


def check_inputs(spec: StageSpec, inputs: dict[str, np.ndarray]) -> dict[str, int]:
    """The size of every named axis, after a check of names, dtypes and shapes.

    Raises:
        HipaError: something is not as ``spec`` says, or an axis has a size out of its range.

    """
    sizes: dict[str, int] = {}
    expected = {tensor.name: tensor for tensor in spec.inputs}
    if inputs.keys() != expected.keys():
        raise HipaError(f"{spec.name}: got inputs {sorted(inputs)}, expected {sorted(expected)}.")
    for name, tensor in expected.items():
        got = inputs[name]
        if got.dtype != tensor.dtype or not _fits(tensor.shape, got.shape, sizes):
            want = f"{tensor.dtype} {list(tensor.shape)}"
            raise HipaError(
                f"{spec.name}: input {name} is {got.dtype} {list(got.shape)}, expected {want}."
            )
    for name, size in sizes.items():
        if size not in spec.axes[name]:
            raise HipaError(f"{spec.name}: {name} is {size}, expected {spec.axes[name]}.")
    return sizes


def _fits(expected: tuple[int | str, ...], got: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Compare dimension by dimension; a name stands for the size it has first, and is noted in ``sizes``."""
    return len(expected) == len(got) and all(
        (sizes.setdefault(want, have) if isinstance(want, str) else want) == have
        for want, have in zip(expected, got, strict=True)
    )
