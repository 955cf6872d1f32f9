"""Exchange the weights of a loaded engine without a rebuild, with TensorRT's Refitter.

Every refittable weight is set at every swap, not only those that the new adaptor changes. A weight
that one adaptor changed and the next does not would otherwise keep the first one's value
(NVIDIA/TensorRT#3628 shows images of two adaptors mixed), and TensorRT-RTX does not report such
weights as missing (pytorch/TensorRT#4198). The bundle's own values are read from its ONNX file, so
going back sets what the engine was built from, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        "11.3.0": "a refittable engine may lose the bias of a matrix product, which no refit can "
        "set (TensorRT 11.3.0 release notes, known issues)",
    },
    "rtx": {},
}

SHOWN = 3  # names in an error message


def refuse_faulty(library: TensorRTLibrary, version: str) -> None:
    """Raise HipaError for a TensorRT whose refittable engines are known to be wrong."""
    for prefix, fault in FAULTS[library].items():
        # With the dot: 11.3.0 must not match 11.3.01.
        if version == prefix or version.startswith(f"{prefix}."):
            raise HipaError(
                f"{library} {version} cannot swap adaptors: {fault}. Use another version, "
                "or export and build a bundle for each adaptor."
            )


def check_refittable(
    trt: ModuleType, engine: Any, stage: str, library: TensorRTLibrary, remedy: str
) -> None:
    """Check that an engine can take other weights.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        engine: the ICudaEngine.
        stage: whose engine it is, for messages.
        library: which of the two libraries ``trt`` is.
        remedy: how to build an engine that can be refitted, for messages.

    Raises:
        HipaError: it was not built to be refitted, or by a version with a known fault.

    """
    refuse_faulty(library, trt.__version__)
    if not engine.refittable:
        raise HipaError(f"{stage}: the engine was not built to take another adaptor. {remedy}")


def refit_engine(
    trt: ModuleType,
    engine: Any,
    onnx: Path,
    changed: Mapping[str, np.ndarray],
    library: TensorRTLibrary,
    remedy: str,
) -> None:
    """Set the weights of ``engine``: ``changed`` where it has them, else those of the ONNX file.

    The engine must be idle. Its execution contexts remain valid; captured CUDA graphs do not.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        engine: the ICudaEngine, built from ``onnx`` with the option ``refit``.
        onnx: the stage's graph, ``STAGE/model.onnx``.
        changed: new values by the names of the graph's initializers; shapes and dtypes as there.
        library: which of the two libraries ``trt`` is.
        remedy: how to build an engine that can be refitted, for messages.

    Raises:
        HipaError: a version with a known fault, an engine that was not built to be refitted, or a
            weight that the engine does not have, holds fixed, or has in another dtype or size. The
            engine is as before.
        RefitFailedError: TensorRT stopped while refitting.

    """
    stage = onnx.parent.name
    check_refittable(trt, engine, stage, library, remedy)
    logger = recording_logger(trt)
    refitter = trt.Refitter(engine, logger)
    names = refitter.get_all_weights()
    fixed = sorted(changed.keys() - set(names))
    if fixed:
        raise HipaError(
            f"{stage}: the engine holds {len(fixed)} of the adaptor's weights fixed "
            f"({_shown(fixed)}). {remedy}"
        )

    # TensorRT reads these arrays when it refits, and not before: they have to live until then.
    kept = []
    for name, value in _new_values(names, changed, onnx).items():
        kept.append(_set_weight(trt, refitter, stage, name, value, remedy))

    missing = refitter.get_missing_weights()
    if missing:
        raise HipaError(f"{stage}: TensorRT asks for weights {_shown(missing)} as well. {remedy}")
    if not refitter.refit_cuda_engine():
        raise RefitFailedError(
            f"{stage}: refitting {len(kept)} weights failed: {logger.last}. Load the bundle again."
        )


def _new_values(
    names: Iterable[str], changed: Mapping[str, np.ndarray], onnx: Path
) -> dict[str, np.ndarray]:
    """A value for every refittable weight that the adaptor or the graph has.

    A weight that neither has is one that TensorRT made itself; it stays as it is.
    """
    own = read_initializers(onnx)
    values = {}
    for name in names:
        if name in changed:
            values[name] = changed[name]
        elif name in own:
            values[name] = own[name].read()
    return values


def _set_weight(
    trt: ModuleType, refitter: Any, stage: str, name: str, value: np.ndarray, remedy: str
) -> np.ndarray:
    """Set one weight and return the array that TensorRT will read when it refits.

    Raises:
        HipaError: the engine has the weight in another dtype or size, or refuses it.

    """
    array = np.ascontiguousarray(value).reshape(-1)
    prototype = refitter.get_weights_prototype(name)
    dtype = np.dtype(trt.nptype(prototype.dtype))
    if (prototype.size, dtype) != (array.size, array.dtype):
        raise HipaError(
            f"{stage}: weight {name} is {prototype.size} of {dtype} in the engine, "
            f"{array.size} of {array.dtype} in the graph. {remedy}"
        )
    if not refitter.set_named_weights(name, array):
        raise HipaError(
            f"{stage}: TensorRT refuses weight {name}: {recording_logger(trt).last}. {remedy}"
        )
    return array


def _shown(names: list[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:SHOWN])


class RefitFailedError(HipaError):
    """The engine holds a mixture of weights, or computes wrongly: it must not be used any more."""
