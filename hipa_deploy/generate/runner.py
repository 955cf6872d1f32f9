"""The runner contract: one stage as a callable, whatever computes it; and the backends' names.

Where runners come from: ``hipa_deploy.generate.open_stages``, the one place that knows how each
backend is opened. A backend that was asked for and cannot run is an error, never another backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from typing_extensions import Self

CPU_BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
BACKENDS = (
    "auto",
    *CPU_BACKENDS,
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-rtx",
    "tensorrt",
    "rtx",
)
ENGINE_BACKENDS = ("tensorrt", "rtx")


class ClosesAtExit:
    """Something with ``close``, as a context manager that closes it at the block's end."""

    def close(self) -> None:
        """Release what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Runner(Protocol):
    """One stage, loaded on one backend.

    Ownership: a runner owns its session or engine and its device memory until ``close``. The arrays
    that it is given stay the caller's. The arrays that it returns are the caller's too: no later
    call writes into them.

    A runner may know more of itself, by these attributes. A backend that does not know leaves them
    out, or they are None:

    - ``device_ms``: milliseconds that the latest call took on the device, copies not counted.
    - ``device_memory_mib``: MiB of device memory that were taken since the runner began to load.
    - ``graph_problem``: why its work could not be captured as a CUDA graph.
    - ``profile_layers(**inputs)``: [(layer, milliseconds)] of a run in a separate pass.
    """

    spec: StageSpec
    """Inputs and outputs of the stage: names, dtypes, shapes, and sizes of named axes."""

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute every output of the stage, by name.

        Args:
            inputs: exactly the inputs of ``spec``, with its dtypes and shapes.

        Raises:
            HipaError: inputs that are not those of ``spec``, or a backend that fails.

        """

    def close(self) -> None:
        """Release the session or engine and its device memory. Calling it twice is harmless."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def check_backend(backend: str) -> None:
    """Check a backend's name.

    Raises:
        HipaError: it is not one of ``BACKENDS``.

    """
    if backend not in BACKENDS:
        raise HipaError(f"backend {backend!r} is unknown. Expected one of: {', '.join(BACKENDS)}.")


def check_inputs(spec: StageSpec, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Check the names, dtypes and shapes of what a stage is given.

    Returns:
        The size of every named axis.

    Raises:
        HipaError: something is not as ``spec`` says, or an axis has a size out of its range.

    Example:
        >>> check_inputs(spec, {"latents": np.zeros((2, 4, 64, 64), np.float16)})
        {'batch': 2}

    """
    expected = {tensor.name: tensor for tensor in spec.inputs}
    if inputs.keys() != expected.keys():
        raise HipaError(f"{spec.name}: got inputs {sorted(inputs)}, expected {sorted(expected)}.")

    # An axis has the size that it has in the first tensor; every other tensor must agree.
    sizes: dict[str, int] = {}
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


def check_outputs(
    spec: StageSpec, outputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> None:
    """Check that a stage gave what its manifest promises: dtypes and shapes.

    Args:
        spec: of the stage.
        outputs: every output by name.
        sizes: of the axes, as ``check_inputs`` returns them.

    Raises:
        HipaError: the graph is another than the manifest says.

    """
    known = dict(sizes)
    for tensor in spec.outputs:
        got = outputs[tensor.name]
        if got.dtype != tensor.dtype or not _fits(tensor.shape, got.shape, known):
            want = f"{tensor.dtype} {list(tensor.shape)}"
            raise HipaError(
                f"{spec.name}: output {tensor.name} is {got.dtype} {list(got.shape)}, the manifest "
                f"says {want}. Export the bundle again."
            )


def _fits(expected: tuple[int | str, ...], got: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Compare dimension by dimension. ``sizes`` notes the size of a named axis where it is new."""
    if len(expected) != len(got):
        return False
    for dimension, size in zip(expected, got, strict=True):
        wanted = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
        if wanted != size:
            return False
    return True
