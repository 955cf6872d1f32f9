"""OpenVINO as a runner, on the CPU: the fastest backend for these graphs without a GPU."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.disk.reading import REEXPORT
from hipa_deploy.engines.backends.available import NO_BF16
from hipa_deploy.engines.backends.compiled_cache import CompiledStage
from hipa_deploy.engines.backends.mapped_blob import MappedBlob
from hipa_deploy.errors import HipaError, MissingDependencyError, as_line
from hipa_deploy.generate.runner import ClosesAtExit, check_inputs, check_outputs

# The precision that a backend computes in. OpenVINO itself would choose bfloat16 wherever that is
# fast. FP16 weights stay FP16 in memory and compute in FP32, as in ONNX Runtime.
_PRECISION = {"openvino": "f32", "openvino-bf16": "bf16"}


class OpenVinoRunner(ClosesAtExit):
    """One stage in OpenVINO, on the CPU.

    The runner owns its memory until ``close``; the arrays that it returns belong to the caller. Any
    thread may call it. Calls at the same time wait for each other: each takes all cores anyway.

    Args:
        path: the stage's ONNX file.
        spec: its inputs and outputs, as the manifest has them.
        backend: 'openvino' (FP32) or 'openvino-bf16' (8 significant bits, on CPUs that multiply
            bfloat16). Whether that is near enough to FP32 for a model, the bundle's own checks say:
            ``hipa-doctor BUNDLE --backend openvino-bf16``.
        compiled: where the compiled stage is kept; None: it is compiled anew.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        HipaError: OpenVINO cannot compile the file, or this CPU has no bfloat16.

    """

    def __init__(
        self,
        path: Path,
        spec: StageSpec,
        backend: str = "openvino",
        *,
        compiled: CompiledStage | None = None,
    ) -> None:
        self.spec = spec
        self._one_call = threading.Lock()
        openvino = load_openvino()
        precision = _PRECISION[backend]
        if precision == "bf16" and not has_bf16(openvino):
            raise HipaError(f"backend {backend}: {NO_BF16}")
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        self._path = path
        self._model: Any = None
        self._blob: MappedBlob | None = None
        if compiled is not None and _is_kept(openvino, path, options, compiled):
            self._load(openvino, options, compiled)
        if self._model is None:
            with as_line(f"{path}: OpenVINO cannot compile it", REEXPORT):
                self._model = core(openvino).compile_model(path, "CPU", options)
        if compiled is not None:
            compiled.warn_if_not_kept()

    def _load(self, openvino: ModuleType, options: dict[str, str], compiled: CompiledStage) -> None:
        """Load the model out of the cache; leave it None if it does not load."""
        try:
            blob = MappedBlob(compiled.folder)
            with blob.letting_go():
                self._model = core(openvino).import_model(blob.tensor(openvino), "CPU", options)
            self._blob = blob
        except Exception:  # damaged, or removed by another process meanwhile
            compiled.discard()

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name; the arrays belong to the caller.

        Raises:
            HipaError: inputs that are not those of ``spec``, or a closed runner.

        """
        sizes = check_inputs(self.spec, inputs)
        # A compiled model has one request, with one memory for inputs and outputs.
        with self._one_call:
            if self._model is None:
                raise HipaError(f"{self.spec.name}: the runner is closed.")
            with as_line(f"{self.spec.name}: OpenVINO cannot run {self._path}", REEXPORT):
                results = self._model(inputs)
                # OpenVINO's arrays are views of memory that its next run overwrites.
                outputs = {tensor.name: results[tensor.name].copy() for tensor in self.spec.outputs}
        check_outputs(self.spec, outputs, sizes)
        return outputs

    def close(self) -> None:
        """Release the model. Calling it twice is harmless."""
        with self._one_call:
            self._model = None
            self._blob = None  # after the model, which reads it


def compiled_options() -> dict[str, Any]:
    """What decides a compiled model, beside the stage, the backend and the processor."""
    return {"version": load_openvino().get_version()}


def _is_kept(
    openvino: ModuleType, path: Path, options: dict[str, str], compiled: CompiledStage
) -> bool:
    """Whether the compiled model is in the cache, after it was made if it was not.

    OpenVINO's own cache writes it, which takes less memory than an export. It is not asked to find
    it again: its key has the path and the times of the ONNX file, and nothing of weights that lie
    in another file.
    """

    def make(folder: Path) -> None:
        core(openvino).compile_model(path, "CPU", {**options, "CACHE_DIR": str(folder)})

    return compiled.found() or compiled.write(make)


def load_openvino() -> ModuleType:
    """Import OpenVINO.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        HipaError: OpenVINO is installed and does not load.

    """
    try:
        with _without_reports():
            return importlib.import_module("openvino")
    except ModuleNotFoundError:
        raise MissingDependencyError("openvino", "openvino") from None
    except (ImportError, OSError) as error:
        raise HipaError(
            f"openvino does not load ({error}). Run: pip install --force-reinstall openvino"
        ) from None


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep OpenVINO from reporting that it was imported, to Intel by way of Google Analytics.

    It does so wherever it can import its package for that, and has no setting of a program.
    """
    if "openvino" in sys.modules or _REPORTS in sys.modules:
        yield
        return
    sys.modules[_REPORTS] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        sys.modules.pop(_REPORTS, None)


_REPORTS = "openvino_telemetry"
_ONE_CORE = threading.Lock()


def core(openvino: ModuleType) -> Any:
    """The process's one ``Core``, which lives as long as the process.

    The CPU plugin of every Core installs a signal stack (sigaltstack(2)), and restores the stack
    that it found when the Core goes. Suppose two Cores come and go in the same order: the second
    then restores the first's stack, which is unmapped by then. The next Ctrl-C ends the process, or
    overwrites what has been mapped there since. (Read in OpenVINO's source, ``SigAltStackSetup`` of
    src/plugins/intel_cpu; seen with 2026.4.)
    """
    # functools.cache alone would let two threads make two Cores at the first call.
    with _ONE_CORE:
        return _new_core(openvino)


@functools.cache
def _new_core(openvino: ModuleType) -> Any:
    return openvino.Core()


def has_bf16(openvino: ModuleType) -> bool:
    """Whether OpenVINO multiplies bfloat16 on this CPU."""
    return "BF16" in core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
