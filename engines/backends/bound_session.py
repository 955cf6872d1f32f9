"""A session of ONNX Runtime whose inputs and outputs stay in device memory (I/O binding)."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.disk.reading import REEXPORT
from hipa_deploy.errors import as_line


class BoundSession:
    """A session with inputs and outputs at addresses that stay from call to call.

    They have to stay because a CUDA graph holds the addresses that it was captured with. Inputs of
    other shapes get new memory. The session owns all of it, and calls from several threads wait for
    each other.

    Args:
        onnxruntime: the module.
        session: the InferenceSession.
        spec: the stage's inputs and outputs.
        device: 'cuda', 'gpu' or 'cpu'.
        vendor: the PCI number of the device's vendor, which 'gpu' needs; -1 for the others.

    """

    def __init__(
        self,
        onnxruntime: ModuleType,
        session: Any,
        spec: StageSpec,
        device: str,
        vendor: int = -1,
    ) -> None:
        self._onnxruntime = onnxruntime
        self._session = session
        self._spec = spec
        self._device = device
        self._vendor = vendor
        self._shapes: dict[str, tuple[int, ...]] = {}  # those that memory is bound for
        self._one_call = threading.Lock()

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy the inputs in, run, copy the outputs out; these arrays belong to the caller.

        Raises:
            HipaError: ONNX Runtime cannot run it.

        """
        with self._one_call, as_line(f"{self._spec.name}: ONNX Runtime cannot run it", REEXPORT):
            return self._run(inputs)

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = {name: value.shape for name, value in inputs.items()}
        if shapes != self._shapes:
            self._bind(inputs)
            self._shapes = shapes
        for name, value in inputs.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(value))

        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

        # ``numpy()`` may share the bound memory, which the next call overwrites: copy it.
        outputs = {}
        for tensor, value in zip(self._spec.outputs, self._binding.get_outputs(), strict=True):
            outputs[tensor.name] = np.array(value.numpy())
        return outputs

    def _bind(self, inputs: dict[str, np.ndarray]) -> None:
        """Allocate and bind memory for these shapes."""
        self._binding = self._session.io_binding()
        self._inputs = {}
        for name, value in inputs.items():
            self._inputs[name] = self._memory(value.shape, value.dtype)
            self._binding.bind_ortvalue_input(name, self._inputs[name])

        for tensor in self._spec.outputs:
            if self._spec.axes:
                # Only ONNX Runtime knows the shape of such an output, so it allocates the memory:
                # on the host where the device has a vendor, since this call has no place for it.
                where = self._device if self._vendor < 0 else "cpu"
                self._binding.bind_output(tensor.name, where)
            else:
                memory = self._memory(tensor.at({}), np.dtype(tensor.dtype))
                self._binding.bind_ortvalue_output(tensor.name, memory)

    def _memory(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An OrtValue on the device."""
        return self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), dtype, self._device, 0, self._vendor
        )
