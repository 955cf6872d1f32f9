"""Runners: a stage as a callable, whatever computes it.

``open_runner`` is the one place that knows the backends. A backend that was asked for and cannot run is an
error, never another backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
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


def check_backend(backend: str) -> None:
    """Raise HipaError for a name that is not in ``BACKENDS``."""
    if backend not in BACKENDS:
        raise HipaError(f"backend {backend!r} is unknown. Expected one of: {', '.join(BACKENDS)}.")


def check_inputs(spec: StageSpec, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
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
