"""ONNX Runtime as a runner: on the CPU everywhere, on CUDA or TensorRT when onnxruntime-gpu is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from hipa_deploy.bundle import StageSpec
from hipa_deploy.engines.device import INSTALL_ONNXRUNTIME, INSTALL_ONNXRUNTIME_GPU, PROVIDERS
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.onnx_weights import with_values
from hipa_deploy.runners import check_inputs

_ERRORS_ONLY = 3


class OnnxRuntimeRunner:
    """One stage in ONNX Runtime, on exactly the provider that ``backend`` names.

    ``backend`` is 'onnxruntime' (CPU), 'onnxruntime-cuda' or 'onnxruntime-tensorrt'. ``optimise`` False runs the
    graph as it stands. ``weights``, by ONNX name, stand for the graph's own.

    Raises:
        HipaError: the provider is not installed or does not start, the file is not a graph it can load, or weights
            are not of that graph.

    """

    def __init__(
        self,
        path: Path,
        spec: StageSpec,
        backend: str,
        *,
        optimise: bool = True,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.spec = spec
        onnxruntime = _load_onnxruntime()
        _require_provider(onnxruntime, backend)
        options = _session_options(onnxruntime, backend, optimise)
        model = _with_weights(onnxruntime, path, options, weights) if weights else str(path)
        self._session: Any = _open_session(onnxruntime, path, backend, options, model)
        self._outputs = [tensor.name for tensor in spec.outputs]
        _check_names(self._session, spec, path)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name.

        Raises:
            HipaError: inputs that are not those of ``spec``, or a closed runner.

        """
        check_inputs(self.spec, inputs)
        if self._session is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def close(self) -> None:
        """Release the session. Calling it twice is harmless."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _load_onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise HipaError(f"onnxruntime does not load ({error}). Run: {INSTALL_ONNXRUNTIME}") from None


def _require_provider(onnxruntime: ModuleType, backend: str) -> None:
    if backend not in PROVIDERS:
        raise HipaError(f"backend {backend!r} is not ONNX Runtime's. Expected one of: {', '.join(PROVIDERS)}.")
    if PROVIDERS[backend] not in onnxruntime.get_available_providers():
        remedy = INSTALL_ONNXRUNTIME if backend == "onnxruntime" else INSTALL_ONNXRUNTIME_GPU
        raise HipaError(f"backend {backend} is not in the installed onnxruntime. Run: {remedy}")


def _with_weights(onnxruntime: ModuleType, path: Path, options: Any, weights: Mapping[str, np.ndarray]) -> bytes:
    """The graph with other weights, as bytes; those in external data go to ``options``.

    Not ``add_initializer``: it takes effect after the graph's optimisation, which has folded the old values by then.
    """
    model, external = with_values(path, weights)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if external:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in external.values()]
        options.add_external_initializers(list(external), values)
    return model


def _open_session(onnxruntime: ModuleType, path: Path, backend: str, options: Any, model: str | bytes) -> Any:
    provider = PROVIDERS[backend]
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise HipaError(f"{path}: ONNX Runtime cannot load it on {provider}: {first_line(error)}") from None
    if session.get_providers()[0] != provider:
        got = ", ".join(session.get_providers())
        raise HipaError(f"backend {backend}: {provider} did not start, only {got}. Check the CUDA and cuDNN libraries.")
    return session


def _session_options(onnxruntime: ModuleType, backend: str, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.use_deterministic_compute = True
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if backend != "onnxruntime":  # a node that the GPU provider cannot run is an error, not a slow surprise
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _check_names(session: Any, spec: StageSpec, path: Path) -> None:
    for kind, tensors, nodes in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        got, expected = [node.name for node in nodes], [tensor.name for tensor in tensors]
        if got != expected:
            raise HipaError(f"{path} has {kind} {got}, the manifest says {expected}. Export the bundle again.")
