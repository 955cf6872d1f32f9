"""Another adaptor in a loaded stage, without a rebuild: TensorRT's Refitter, or a new session of ONNX Runtime.

Every refittable weight is set at every swap, not only those that the new adaptor changes: what one adaptor changed
and the next does not would otherwise remain (NVIDIA/TensorRT#3628 shows images of two adaptors mixed), and
TensorRT-RTX does not report such weights as missing (pytorch/TensorRT#4198). The bundle's own values are read from its
ONNX file, so going back sets what the engine was built from, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.onnx_weights import read_initializers
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, recording_logger
from hipa_deploy.errors import HipaError

# Releases whose refittable engines are known to compute wrongly, by what their version begins with.
FAULTS: dict[TensorRTLibrary, dict[str, str]] = {
    "tensorrt": {
        "11.3.0": "a refittable engine may lose the bias of a matrix product, which no refit can set "
        "(TensorRT 11.3.0 release notes, known issues)",
    },
    "rtx": {},
}
SHOWN = 3  # names in an error message


def refuse_faulty(library: TensorRTLibrary, version: str) -> None:
    """Raise HipaError for a TensorRT whose refittable engines are known to be wrong."""
    for prefix, fault in FAULTS[library].items():
        if version == prefix or version.startswith(f"{prefix}."):
            raise HipaError(
                f"{library} {version} cannot swap adaptors: {fault}. Use another version, "
                "or export and build a bundle for each adaptor."
            )


def refit_engine(
    trt: ModuleType,
    engine: Any,
    onnx: Path,
    changed: Mapping[str, np.ndarray],
    library: TensorRTLibrary,
    remedy: str,
) -> None:
    """Give ``engine``, built from the file ``onnx``, the weights ``changed``, and that file's own for every other.

    The engine must be idle; its execution contexts remain valid.

    Raises:
        HipaError: a version with a known fault, an engine that was not built to be refitted, or a weight that it has
            not, not as refittable, or in another type or size. The engine is as before.
        RefitFailedError: TensorRT stopped while refitting.

    """
    refuse_faulty(library, trt.__version__)
    stage, logger = onnx.parent.name, recording_logger(trt)
    if not engine.refittable:
        raise HipaError(f"{stage}: the engine was not built to take another adaptor. {remedy}")
    refitter = trt.Refitter(engine, logger)
    names, own = refitter.get_all_weights(), read_initializers(onnx)
    if fixed := sorted(changed.keys() - set(names)):
        shown = ", ".join(fixed[:SHOWN])
        raise HipaError(
            f"{stage}: the engine holds {len(fixed)} of the adaptor's weights fixed ({shown}). {remedy}"
        )
    # What is neither the adaptor's nor the graph's is TensorRT's own, and stays.
    values = {
        n: changed[n] if n in changed else own[n].read() for n in names if n in changed or n in own
    }
    kept = [
        _set_weight(trt, refitter, stage, name, value, remedy) for name, value in values.items()
    ]
    if missing := refitter.get_missing_weights():
        raise HipaError(
            f"{stage}: TensorRT asks for weights {', '.join(missing[:SHOWN])} as well. {remedy}"
        )
    if not refitter.refit_cuda_engine():
        raise RefitFailedError(
            f"{stage}: refitting {len(kept)} weights failed: {logger.last}. Load the bundle again."
        )


def _set_weight(
    trt: ModuleType, refitter: Any, stage: str, name: str, value: np.ndarray, remedy: str
) -> np.ndarray:
    """Set one weight; the array that TensorRT reads when it refits, and not before."""
    array, prototype = np.ascontiguousarray(value).reshape(-1), refitter.get_weights_prototype(name)
    dtype = np.dtype(trt.nptype(prototype.dtype))
    if (prototype.size, dtype) != (array.size, array.dtype):
        want, got = f"{prototype.size} of {dtype}", f"{array.size} of {array.dtype}"
        raise HipaError(
            f"{stage}: weight {name} is {want} in the engine, {got} in the graph. {remedy}"
        )
    if not refitter.set_named_weights(name, array):
        raise HipaError(
            f"{stage}: TensorRT refuses weight {name}: {recording_logger(trt).last}. {remedy}"
        )
    return array


class RefitFailedError(HipaError):
    """The engine holds a mixture of weights, or computes wrongly with them, and must not be used any more."""
