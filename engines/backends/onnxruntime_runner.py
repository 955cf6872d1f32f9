"""ONNX Runtime as a runner: on the CPU everywhere, on a GPU by onnxruntime-gpu or by a plugin."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache as only_once
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.bundle.onnx_weights import with_values
from hipa_deploy.disk.reading import REEXPORT, inside_folder
from hipa_deploy.engines.backends import rtx_plugin
from hipa_deploy.engines.backends.available import (
    INSTALL_ONNXRUNTIME,
    INSTALL_ONNXRUNTIME_GPU,
    PROVIDERS,
)
from hipa_deploy.engines.backends.bound_session import BoundSession
from hipa_deploy.engines.backends.compiled_cache import CompiledStage
from hipa_deploy.engines.backends.onnxruntime_compiled import optimised_session, saves_packed
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.errors import HipaError, as_line, first_line
from hipa_deploy.generate.runner import ClosesAtExit, check_inputs, check_outputs

_ERRORS_ONLY = 3  # ONNX Runtime's log severity

# The provider option that captures a session as a CUDA graph, and how a refusal of it reads.
_GRAPH = {
    "onnxruntime-cuda": "enable_cuda_graph",
    "onnxruntime-tensorrt": "trt_cuda_graph_enable",
    rtx_plugin.BACKEND: "enable_cuda_graph",
}
_NO_GRAPH = r"cannot use the (cuda graph|graph capture) feature"

# Their libraries are linked to CUDA's, which pip installs where no loader looks.
_NEED_CUDA = ("onnxruntime-cuda", "onnxruntime-tensorrt")

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class OnnxRuntimeRunner(ClosesAtExit):
    """One stage in ONNX Runtime, on exactly the provider that ``backend`` names.

    On a GPU, inputs and outputs are bound to device memory, and a stage with static shapes is
    captured as a CUDA graph. Where ONNX Runtime refuses that, a RuntimeWarning and
    ``graph_problem`` say why, and the stage runs without a graph.

    The runner owns its memory until ``close``; the arrays that it returns belong to the caller. Any
    thread may call it, several at once too.

    Args:
        path: the stage's ONNX file.
        spec: its inputs and outputs, as the manifest has them.
        backend: 'onnxruntime' (CPU), 'onnxruntime-cuda', 'onnxruntime-tensorrt' or
            'onnxruntime-rtx'.
        optimise: False runs the graph as it stands in the file.
        cache: a folder where the TensorRT provider keeps the engines that it builds on a first run,
            and the RTX provider the kernels that it compiles; None: they keep none.
        weights: values by ONNX name that replace the graph's own.
        compiled: where the optimised graph is kept, on the CPU and with the graph's own weights;
            None: the graph is optimised anew.

    Raises:
        HipaError: the provider is not installed or does not start, ONNX Runtime cannot load the
            file, or weights are not of that graph.

    Example:
        >>> with OnnxRuntimeRunner(path, spec, "onnxruntime") as unet:
        ...     latents_BCHW = unet(noise=noise_BCHW, context=context_BLD)["latents"]

    """

    # ONNX Runtime reports neither.
    device_ms: float | None = None
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
        compiled: CompiledStage | None = None,
    ) -> None:
        self.spec = spec
        self._path = path
        self.graph_problem: str | None = None
        onnxruntime = _load_onnxruntime()
        if backend in _NEED_CUDA:
            _preload_cuda(onnxruntime)
        _require_provider(onnxruntime, backend)
        settings = provider_options(backend, spec, cache and _writable(cache))

        def start() -> Any:
            # Options are of one session: a plugin's device is added to them, and cannot be removed.
            options = _session_options(onnxruntime, backend, optimise)
            model = _with_weights(onnxruntime, path, options, weights) if weights else str(path)
            return _open_session(onnxruntime, path, backend, options, settings, model)

        session: Any = None
        if compiled is not None and backend == "onnxruntime" and optimise and not weights:
            session = optimised_session(
                onnxruntime, path, partial(_session_options, onnxruntime, backend), compiled
            )
        try:
            if session is None:
                session = start()
        except _NoGraphError as error:
            self.graph_problem = str(error)
            warnings.warn(
                f"{spec.name}: no CUDA graph ({error}); "
                "kernels are launched one by one, which costs some time.",
                RuntimeWarning,
                stacklevel=2,
            )
            settings = {name: settings[name] for name in settings if name != _GRAPH[backend]}
            session = start()

        if compiled is not None:
            compiled.warn_if_not_kept()
        if backend == rtx_plugin.BACKEND:
            rtx_plugin.check_assignment(session, spec.name)
        _check_names(path, "inputs", session.get_inputs(), spec.inputs)
        _check_names(path, "outputs", session.get_outputs(), spec.outputs)
        self._run: Run | None
        if backend == "onnxruntime":
            self._run = partial(_run_on_host, session, [tensor.name for tensor in spec.outputs])
        elif backend == rtx_plugin.BACKEND:
            self._run = BoundSession(onnxruntime, session, spec, "gpu", rtx_plugin.NVIDIA)
        else:
            self._run = BoundSession(onnxruntime, session, spec, "cuda")

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name; the arrays belong to the caller.

        Raises:
            HipaError: inputs that are not those of ``spec``, a closed runner, or an error of ONNX
                Runtime's.

        """
        sizes = check_inputs(self.spec, inputs)
        run = self._run  # read once: another thread may close the runner meanwhile
        if run is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        with as_line(f"{self.spec.name}: ONNX Runtime cannot run {self._path}", REEXPORT):
            outputs = run(inputs)
        check_outputs(self.spec, outputs, sizes)
        return outputs

    def close(self) -> None:
        """Release the session. Calling it twice is harmless."""
        self._run = None


def _run_on_host(
    session: Any, outputs: list[str], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))


def provider_options(backend: str, spec: StageSpec, cache: Path | None) -> dict[str, str]:
    """The options of a backend's execution provider.

    There is no trt_fp16_enable: without it the TensorRT provider (10.x and newer) builds strongly
    typed networks, so the graph says the precision. There is no TF32 either: float32 is float32
    (the RTX provider has no option for it).
    """
    if backend == "onnxruntime":
        return {}
    # A graph holds addresses, and other shapes have others: only static shapes are captured.
    graph = {} if spec.axes else {_GRAPH[backend]: "1"}
    if backend == "onnxruntime-cuda":
        return {"use_tf32": "0", **graph}

    rtx = backend == rtx_plugin.BACKEND
    options = {}
    if cache and rtx:
        options["nv_runtime_cache_path"] = str(cache)
    elif cache:
        options["trt_engine_cache_enable"] = "1"
        options["trt_engine_cache_path"] = str(cache)
    if spec.axes:
        prefix = "nv" if rtx else "trt"
        for bound in ("min", "opt", "max"):
            options[f"{prefix}_profile_{bound}_shapes"] = _profile_shapes(spec, spec.sizes(bound))
    return {**options, **graph}


def _profile_shapes(spec: StageSpec, sizes: Mapping[str, int]) -> str:
    """Shapes as the TensorRT providers read them: 'noise:1x4x64x64,context:1x77x768'."""
    shapes = []
    for tensor in spec.inputs:
        dimensions = "x".join(map(str, tensor.at(sizes)))
        shapes.append(f"{tensor.name}:{dimensions}")
    return ",".join(shapes)


def engine_cache(bundle: Bundle, stage: str, backend: str) -> Path | None:
    """The folder where a TensorRT provider keeps what it made of this stage; None for the others.

    The TensorRT provider checks neither the weights nor the device before it takes an engine from
    its cache. So the folder's name has a hash of both, and of the versions.
    """
    if backend not in ("onnxruntime-tensorrt", rtx_plugin.BACKEND):
        return None
    gpu = find_gpu()
    files = bundle.manifest.files
    folder = PurePosixPath(bundle.all_stages[stage].path).parent
    hashes = [files[name] for name in sorted(files) if PurePosixPath(name).parent == folder]
    device = gpu.model_dump(mode="json") if gpu else None
    facts = [_load_onnxruntime().__version__, device, hashes]
    if backend == rtx_plugin.BACKEND:
        facts.append(rtx_plugin.installed_version())
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return inside_folder(bundle.root, f"engines/{backend}/{stage}-{key}")


def _writable(cache: Path) -> Path | None:
    """Make the folder. None, with a RuntimeWarning, if that is not permitted."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(
            f"{cache} cannot be written ({error.strerror}): TensorRT builds the stage anew at "
            "every start. Copy the bundle to a folder of your own.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return cache


def compiled_options() -> dict[str, Any]:
    """What decides an optimised graph, beside the stage and the processor."""
    onnxruntime = _load_onnxruntime()
    return {
        "version": onnxruntime.__version__,
        "build": onnxruntime.get_build_info(),
        "packed": saves_packed(onnxruntime.__version__),
    }


def _load_onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise HipaError(
            f"onnxruntime does not load ({error}). Run: {INSTALL_ONNXRUNTIME}"
        ) from None


@only_once
def _preload_cuda(onnxruntime: ModuleType) -> None:
    """Load CUDA's and cuDNN's libraries out of NVIDIA's packages, or from the system.

    ONNX Runtime does not do so by itself. What is missing shows when the provider does not start.
    """
    # ONNX Runtime 1.21 and newer.
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is None:
        return
    # It prints what it does not find, to where a command's result goes.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError, RuntimeError):
        # "": NVIDIA's packages and the system. By default it would search torch's folder first.
        preload(directory="")


def _require_provider(onnxruntime: ModuleType, backend: str) -> None:
    """Raise HipaError unless the installed package has the provider of ``backend``."""
    if backend not in PROVIDERS:
        raise HipaError(
            f"backend {backend!r} is not ONNX Runtime's. Expected one of: {', '.join(PROVIDERS)}."
        )
    # A plugin is no part of the package: ``plugin_device`` says what is wrong with it.
    if backend == rtx_plugin.BACKEND:
        return
    if PROVIDERS[backend] not in onnxruntime.get_available_providers():
        remedy = INSTALL_ONNXRUNTIME if backend == "onnxruntime" else INSTALL_ONNXRUNTIME_GPU
        raise HipaError(f"backend {backend} is not in the installed onnxruntime. Run: {remedy}")


class _NoGraphError(Exception):
    """ONNX Runtime refuses to capture this session."""


def _with_weights(
    onnxruntime: ModuleType, path: Path, options: Any, weights: Mapping[str, np.ndarray]
) -> bytes:
    """The graph with other weights, as bytes; those in external data go to ``options``.

    ``add_initializer`` would not do: it takes effect after the graph's optimisation, which has
    folded the old values by then.
    """
    model, external = with_values(path, weights)
    # A model from bytes has no folder, so ONNX Runtime has to be told where its other weights lie.
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
    """An InferenceSession on the provider of ``backend`` and no other.

    Raises:
        _NoGraphError: ONNX Runtime refuses to capture it; without the option it may load.
        HipaError: ONNX Runtime cannot load it, or the provider does not start.

    """
    provider = PROVIDERS[backend]
    providers: list[tuple[str, dict[str, str]]] | None = [(provider, settings)]
    if backend == rtx_plugin.BACKEND:
        options.add_provider_for_devices([rtx_plugin.plugin_device(onnxruntime)], settings)
        providers = None
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        words = first_line(error)
        if _GRAPH.get(backend) in settings and re.search(_NO_GRAPH, words, re.IGNORECASE):
            raise _NoGraphError(words) from None
        raise HipaError(f"{path}: ONNX Runtime cannot load it on {provider}: {words}") from None

    # A provider whose libraries do not load is left out with no more than a log line.
    if session.get_providers()[0] != provider:
        others = ", ".join(session.get_providers())
        libraries = "the CUDA and cuDNN libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        if backend == rtx_plugin.BACKEND:
            libraries = "the driver: nvidia-smi"
        raise HipaError(
            f"backend {backend}: {provider} did not start, only {others}. Check {libraries}."
        )
    return session


def _session_options(onnxruntime: ModuleType, backend: str, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.use_deterministic_compute = True
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if backend == "onnxruntime":
        # Threads that wait sleep instead of spinning. On two cores that takes 17 ms an image in
        # place of 24 for the embedded model, and 1 % more time at the size of SD 1.5; and whatever
        # else runs on the machine has the cores meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # With patterns, the second run takes a second block for all of its tensors and keeps the
        # first: 1.2 GB more for the decoder of SD 1.5, for no time that could be measured.
        options.enable_mem_pattern = False
    else:
        # A node that the GPU provider cannot run is an error, not a slow surprise.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if backend == rtx_plugin.BACKEND:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _check_names(path: Path, kind: str, nodes: list[Any], tensors: tuple[TensorSpec, ...]) -> None:
    """Raise HipaError unless the graph's inputs or outputs are the manifest's, in its order."""
    names = [node.name for node in nodes]
    expected = [tensor.name for tensor in tensors]
    if names != expected:
        raise HipaError(
            f"{path} has {kind} {names}, the manifest says {expected}. Export the bundle again."
        )
