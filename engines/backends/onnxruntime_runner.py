"""ONNX Runtime as a runner: on the CPU everywhere, on CUDA or TensorRT when onnxruntime-gpu is installed."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.bundle.onnx_weights import with_values
from hipa_deploy.engines.backends.available import (
    INSTALL_ONNXRUNTIME,
    INSTALL_ONNXRUNTIME_GPU,
    PROVIDERS,
)
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.generate.runner import check_inputs

_ERRORS_ONLY = 3
_GRAPH = {"onnxruntime-cuda": "enable_cuda_graph", "onnxruntime-tensorrt": "trt_cuda_graph_enable"}
_NO_GRAPH = r"cannot use the (cuda graph|graph capture) feature"

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class OnnxRuntimeRunner:
    """One stage in ONNX Runtime, on exactly the provider that ``backend`` names.

    ``backend`` is 'onnxruntime' (CPU), 'onnxruntime-cuda' or 'onnxruntime-tensorrt'. ``optimise`` False runs the
    graph as it stands. ``cache`` is where the TensorRT provider keeps the engines it builds on a first run; None
    keeps none. On a GPU inputs and outputs are bound to device memory, and a stage with static shapes is captured as
    a CUDA graph; where ONNX Runtime refuses that, ``graph_problem`` says why and a RuntimeWarning was given.
    ``weights``, by ONNX name, stand for the graph's own.

    Raises:
        HipaError: the provider is not installed or does not start, the file is not a graph it can load, or weights
            are not of that graph.

    """

    device_ms: float | None = None  # ONNX Runtime tells neither
    device_memory_mib: int | None = None

    def __init__(
        self,
        path: Path,
        spec: StageSpec,
        backend: str,
        *,
        optimise: bool = True,
        cache: Path | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.spec = spec
        self.graph_problem: str | None = None
        onnxruntime = _load_onnxruntime()
        _require_provider(onnxruntime, backend)
        options = _session_options(onnxruntime, backend, optimise)
        settings = provider_options(backend, spec, cache and _writable(cache))
        model = _with_weights(onnxruntime, path, options, weights) if weights else str(path)
        try:
            session: Any = _open_session(onnxruntime, path, backend, options, settings, model)
        except _NoGraphError as error:
            self.graph_problem = str(error)
            told = f"{spec.name}: no CUDA graph ({error}); kernels are launched one by one, which costs some time."
            warnings.warn(told, RuntimeWarning, stacklevel=2)
            settings = {
                name: value for name, value in settings.items() if name not in _GRAPH.values()
            }
            session = _open_session(onnxruntime, path, backend, options, settings, model)
        _check_names(session, spec, path)
        self._run: Run | None = (
            partial(_run_on_host, session, [tensor.name for tensor in spec.outputs])
            if backend == "onnxruntime"
            else BoundSession(onnxruntime, session, spec, "cuda")
        )

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name.

        Raises:
            HipaError: inputs that are not those of ``spec``, a closed runner, or what ONNX Runtime says of a run.

        """
        check_inputs(self.spec, inputs)
        if self._run is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        return self._run(inputs)

    def close(self) -> None:
        """Release the session. Calling it twice is harmless."""
        self._run = None

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _run_on_host(
    session: Any, outputs: list[str], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))


class BoundSession:
    """A session whose inputs and outputs live in ``device`` memory ('cuda', or 'cpu') at addresses that stay.

    They must stay, for a CUDA graph has them in it. Other shapes get memory of their own.
    """

    def __init__(self, onnxruntime: ModuleType, session: Any, spec: StageSpec, device: str) -> None:
        self._onnxruntime, self._session, self._spec, self._device = (
            onnxruntime,
            session,
            spec,
            device,
        )
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy in, run, copy out; the arrays belong to the caller.

        Raises:
            HipaError: ONNX Runtime cannot run it.

        """
        try:
            shapes = {name: value.shape for name, value in inputs.items()}
            if shapes != self._shapes:
                self._bind(inputs)
                self._shapes = shapes
            for name, value in inputs.items():
                self._inputs[name].update_inplace(np.ascontiguousarray(value))
            self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return dict(
                zip(
                    self._names,
                    (np.array(v.numpy()) for v in self._binding.get_outputs()),
                    strict=True,
                )
            )
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise HipaError(
                f"{self._spec.name}: ONNX Runtime cannot run it: {first_line(error)}"
            ) from None

    def _bind(self, inputs: dict[str, np.ndarray]) -> None:
        """Memory for these shapes. An output whose shape depends on named axes is ONNX Runtime's to allocate."""
        self._binding = self._session.io_binding()
        self._names = [tensor.name for tensor in self._spec.outputs]
        self._inputs = {
            name: self._memory(value.shape, value.dtype) for name, value in inputs.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for tensor in self._spec.outputs:
            if self._spec.axes:
                self._binding.bind_output(tensor.name, self._device)
            else:
                memory = self._memory(tensor.at({}), np.dtype(tensor.dtype))
                self._binding.bind_ortvalue_output(tensor.name, memory)

    def _memory(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), dtype, self._device, 0
        )


def provider_options(backend: str, spec: StageSpec, cache: Path | None) -> dict[str, str]:
    """What the provider of ``backend`` is told.

    No trt_fp16_enable: without it the TensorRT provider builds strongly typed networks (10.x and newer), so the graph
    says the precision. No TF32 either: float32 is float32.
    """
    if backend == "onnxruntime":
        return {}
    static = {_GRAPH[backend]: "1"} if not spec.axes else {}
    if backend == "onnxruntime-cuda":
        return {"use_tf32": "0", **static}
    options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)} if cache else {}
    for which in ("min", "opt", "max") if spec.axes else ():
        shapes = (f"{t.name}:{'x'.join(map(str, t.at(spec.sizes(which))))}" for t in spec.inputs)
        options[f"trt_profile_{which}_shapes"] = ",".join(shapes)
    return {**options, **static}


def engine_cache(bundle: Bundle, stage: str) -> Path:
    """Where the TensorRT provider keeps this stage's engines.

    The provider looks at neither the weights nor the device before it takes an engine from its cache, so both are in
    the folder's name, and its own version.
    """
    gpu, files = find_gpu(), bundle.manifest.files
    folder = PurePosixPath(bundle.stages[stage].path).parent
    parts = [files[name] for name in sorted(files) if PurePosixPath(name).parent == folder]
    identity = json.dumps(
        [_load_onnxruntime().__version__, gpu and gpu.model_dump(mode="json"), parts]
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return bundle.root / "engines" / "onnxruntime-tensorrt" / f"{stage}-{key}"


def _writable(cache: Path) -> Path | None:
    """The folder, made; or None, with a RuntimeWarning, if nobody may write there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"{cache} cannot be written ({error.strerror}): TensorRT builds the stage anew at every start."
        warnings.warn(
            f"{told} Copy the bundle to a folder of your own.", RuntimeWarning, stacklevel=3
        )
        return None
    return cache


def _load_onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise HipaError(
            f"onnxruntime does not load ({error}). Run: {INSTALL_ONNXRUNTIME}"
        ) from None


def _require_provider(onnxruntime: ModuleType, backend: str) -> None:
    if backend not in PROVIDERS:
        raise HipaError(
            f"backend {backend!r} is not ONNX Runtime's. Expected one of: {', '.join(PROVIDERS)}."
        )
    if PROVIDERS[backend] not in onnxruntime.get_available_providers():
        remedy = INSTALL_ONNXRUNTIME if backend == "onnxruntime" else INSTALL_ONNXRUNTIME_GPU
        raise HipaError(f"backend {backend} is not in the installed onnxruntime. Run: {remedy}")


class _NoGraphError(Exception):
    """ONNX Runtime refuses to capture this session."""


def _with_weights(
    onnxruntime: ModuleType, path: Path, options: Any, weights: Mapping[str, np.ndarray]
) -> bytes:
    """The graph with other weights, as bytes; those in external data go to ``options``.

    Not ``add_initializer``: it takes effect after the graph's optimisation, which has folded the old values by then.
    """
    model, external = with_values(path, weights)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    if external:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in external.values()]
        options.add_external_initializers(list(external), values)
    return model


def _open_session(
    onnxruntime: ModuleType,
    path: Path,
    backend: str,
    options: Any,
    settings: dict[str, str],
    model: str | bytes,
) -> Any:
    provider = PROVIDERS[backend]
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=[(provider, settings)], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        words = first_line(error)
        if _GRAPH.get(backend) in settings and re.search(_NO_GRAPH, words, re.IGNORECASE):
            raise _NoGraphError(words) from None
        raise HipaError(f"{path}: ONNX Runtime cannot load it on {provider}: {words}") from None
    if session.get_providers()[0] != provider:
        got = ", ".join(session.get_providers())
        raise HipaError(
            f"backend {backend}: {provider} did not start, only {got}. Check the CUDA and cuDNN libraries."
        )
    return session


def _session_options(onnxruntime: ModuleType, backend: str, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.use_deterministic_compute = True
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if backend == "onnxruntime":
        # Threads that wait asleep, not spinning: on two cores 17 ms an image in place of 24 for the embedded model, 1 %
        # more time at SD 1.5 size; and what else runs on the machine has the cores meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if (
        backend != "onnxruntime"
    ):  # a node that the GPU provider cannot run is an error, not a slow surprise
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _check_names(session: Any, spec: StageSpec, path: Path) -> None:
    for kind, tensors, nodes in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        got, expected = [node.name for node in nodes], [tensor.name for tensor in tensors]
        if got != expected:
            raise HipaError(
                f"{path} has {kind} {got}, the manifest says {expected}. Export the bundle again."
            )
