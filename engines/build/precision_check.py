"""Which precision a network or an engine really computes in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from hipa_deploy.bundle.manifest import Precision
from hipa_deploy.engines.store.sidecar import PrecisionCheck
from hipa_deploy.errors import HipaError

_OTHER = {"fp16": "fp32", "fp32": "fp16"}
_HEAVY = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


def check_network(trt: ModuleType, network: Any, asked: Precision) -> PrecisionCheck:
    """Count the types that a parsed, strongly typed network computes in.

    Only convolutions and matrix products count, where the network has any: normalisations and the
    step's arithmetic stay in FP32 on purpose.

    Raises:
        HipaError: most of them are not of the precision that was asked for.

    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    heavy = [
        layer for layer in layers if layer.type in {getattr(trt.LayerType, name) for name in _HEAVY}
    ]
    types = [layer.get_output(0).dtype for layer in heavy or layers]
    check = PrecisionCheck(
        by="network types", float16=types.count(trt.float16), float32=types.count(trt.float32)
    )
    if wrong := _wrong(check, asked):
        raise HipaError(
            f"the ONNX graph is not {asked}: "
            f"{wrong} of {check.float16 + check.float32} convolutions and matrix "
            f"products are {_OTHER[asked]}. "
            f"Precision lives in the graph: export the bundle again with --dtype {asked}."
        )
    return check


def read_back(trt: ModuleType, logger: Any, engine: Any, asked: Precision) -> PrecisionCheck | None:
    """Count the output types that a built engine reports; None when it reports none.

    This needs a driver.

    Raises:
        HipaError: most of them are not of the precision that was asked for.

    """
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return check_inspected(text, asked)


def check_inspected(text: str, asked: Precision) -> PrecisionCheck | None:
    """Count the types in an inspector's JSON; None without types in it.

    Raises:
        HipaError: most of them are not of the precision that was asked for.

    """
    check = parse_inspector(text)
    if check is not None and (wrong := _wrong(check, asked)):
        raise HipaError(
            f"the engine was built in {_OTHER[asked]}, {asked} was asked for: {wrong} of "
            f"{check.float16 + check.float32} outputs, by its inspector. "
            "Report it with hipa-doctor --self-test."
        )
    return check


def _wrong(check: PrecisionCheck, asked: Precision) -> int:
    """How many are of the other precision, where they are more than half."""
    wrong, right = (
        (check.float32, check.float16) if asked == "fp16" else (check.float16, check.float32)
    )
    return wrong if wrong > right else 0


def parse_inspector(text: str) -> PrecisionCheck | None:
    """Types in the inspector's JSON, or None: TensorRT 10 has 'Format/Datatype', 11 'DataType'."""
    try:
        types = [kind for tensor in _outputs(json.loads(text)) if (kind := _type_of(tensor))]
    except ValueError:
        return None
    if not types:
        return None
    return PrecisionCheck(by="inspector", float16=types.count("fp16"), float32=types.count("fp32"))


def _outputs(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for layer in report.get("Layers", []):
        if isinstance(layer, dict):  # names alone, without ProfilingVerbosity.DETAILED
            yield from layer.get("Outputs", [])


def _type_of(tensor: dict[str, Any]) -> Precision | None:
    text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "")
    if "FP16" in text or "Half" in text:
        return "fp16"
    return "fp32" if "FP32" in text or "Float" in text else None
