"""Which precision a network or an engine really computes in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from hipa_deploy.bundle.manifest import Precision
from hipa_deploy.engines.store.sidecar import PrecisionCheck
from hipa_deploy.errors import HipaError

_OTHER = {"fp16": "fp32", "fp32": "fp16"}
# The layers that hold nearly all operations of a stage.
_HEAVY = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
# How an engine calls them: CaskConvolution, CaskConvActPool, CaskGemmMatrixMultiply, conv, gemm.
_HEAVY_KERNELS = re.compile(r"conv|gemm|matrix", re.IGNORECASE)


def check_network(
    trt: ModuleType, network: Any, requested: Precision, *, has_islands: bool = False
) -> PrecisionCheck:
    """Count the types that a parsed, strongly typed network computes in.

    If the network has convolutions or matrix products, only these count: normalisations and the
    arithmetic of the step stay in FP32 on purpose.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        network: the parsed network.
        requested: the precision of the stage.
        has_islands: whether parts of the graph are in FP32 on purpose, by the export or to mend an
            engine. They may be most of it, such as every attention of a UNet.

    Raises:
        HipaError: most of the counted layers are not of the requested precision.

    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    heavy_types = {getattr(trt.LayerType, name) for name in _HEAVY}
    heavy = [layer for layer in layers if layer.type in heavy_types]
    types = [layer.get_output(0).dtype for layer in heavy or layers]
    check = PrecisionCheck(
        by="network types", float16=types.count(trt.float16), float32=types.count(trt.float32)
    )

    # Without this check a graph of the wrong precision would build, and only be slow or inexact.
    wrong = 0 if has_islands else _count_wrong(check, requested)
    if wrong:
        raise HipaError(
            f"the ONNX graph is not {requested}: "
            f"{wrong} of {check.float16 + check.float32} convolutions and matrix "
            f"products are {_OTHER[requested]}. "
            "The precision is part of the graph: "
            f"export the bundle again with --dtype {requested}."
        )
    return check


def inspect(trt: ModuleType, logger: Any, engine: Any) -> tuple[str, int | None]:
    """The JSON of an engine's inspector, and the bytes that its activations take.

    The engine is loaded, which needs a driver. An empty text and None if it does not load.
    """
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return "", None
    inspector = loaded.create_engine_inspector()
    text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return text, int(loaded.device_memory_size_v2)


def check_inspected(
    text: str, requested: Precision, *, has_islands: bool = False
) -> PrecisionCheck | None:
    """Count the types in the JSON of an engine inspector; None if there are none in it.

    Args:
        text: the JSON.
        requested: the precision of the stage.
        has_islands: as ``check_network`` takes it.

    Raises:
        HipaError: most of the outputs are not of the requested precision.

    """
    check = parse_inspector(text)
    if check is None:
        return None
    wrong = 0 if has_islands else _count_wrong(check, requested)
    if wrong:
        raise HipaError(
            f"the engine was built in {_OTHER[requested]}, but {requested} was requested: "
            f"{wrong} of {check.float16 + check.float32} outputs, according to its inspector. "
            "Report it with hipa-doctor --self-test."
        )
    return check


def _count_wrong(check: PrecisionCheck, requested: Precision) -> int:
    """How many types are of the other precision; 0 unless they are more than half."""
    if requested == "fp16":
        wrong = check.float32
        right = check.float16
    else:
        wrong = check.float16
        right = check.float32
    return wrong if wrong > right else 0


def parse_inspector(text: str) -> PrecisionCheck | None:
    """Count the types in the JSON of an engine inspector; None if there are none in it.

    Where layers have a type, only convolutions and matrix products count, as in the network. A part
    that TensorRT's compiler shows as one layer says nothing: its output may be the stage's alone,
    which is FP32 in an FP16 UNet.

    TensorRT 10 writes the type as 'Format/Datatype', TensorRT 11 as 'DataType'.

    Example:
        >>> parse_inspector('{"Layers": [{"Outputs": [{"DataType": "Half"}]}]}').float16
        1

    """
    types: list[Precision] = []
    try:
        for tensor in _outputs(json.loads(text)):
            precision = _type_of(tensor)
            if precision is not None:
                types.append(precision)
    except ValueError:  # not JSON
        return None
    if not types:
        return None
    return PrecisionCheck(by="inspector", float16=types.count("fp16"), float32=types.count("fp32"))


def _outputs(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # Without ProfilingVerbosity.DETAILED a layer is only its name, a string.
    layers = [layer for layer in report.get("Layers", []) if isinstance(layer, dict)]
    if any("LayerType" in layer for layer in layers):
        layers = [layer for layer in layers if _HEAVY_KERNELS.search(str(layer.get("LayerType")))]
    for layer in layers:
        yield from layer.get("Outputs", [])


def _type_of(tensor: dict[str, Any]) -> Precision | None:
    """The precision of an output; None for other types, such as integers."""
    text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "")
    if "FP16" in text or "Half" in text:
        return "fp16"
    if "FP32" in text or "Float" in text:
        return "fp32"
    return None
