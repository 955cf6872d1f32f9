"""The JSON of TensorRT's engine inspector, in the two forms that NVIDIA documents.

The JSON is written by hand, because reading an engine needs a driver.
"""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace

import pytest

from hipa_deploy.engines.build.precision_check import check_inspected, inspect, parse_inspector
from hipa_deploy.errors import HipaError

TENSORRT_10 = {
    "Layers": [
        {
            "Name": "a",
            "Outputs": [{"Name": "t", "Format/Datatype": "Row major linear FP16 format"}],
        },
        {"Name": "b", "Outputs": [{"Name": "u", "Format/Datatype": "Row major linear FP32"}]},
        {
            "Name": "c",
            "Outputs": [{"Name": "v", "Format/Datatype": "Row major linear UInt8 format"}],
        },
    ],
    "Bindings": ["x", "y"],
}
TENSORRT_11 = {
    "Layers": [
        {"Name": "a", "Outputs": [{"Name": "t", "DataType": "Half", "Format": "Row major linear"}]},
        {"Name": "b", "Outputs": [{"Name": "u", "DataType": "Float"}]},
    ],
    "I/O Tensors": [{"Name": "x", "DataType": "Float"}],
}


@pytest.mark.parametrize("report", [TENSORRT_10, TENSORRT_11])
def test_both_forms_are_read(report):
    check = parse_inspector(json.dumps(report))
    assert (check.by, check.float16, check.float32) == ("inspector", 1, 1)


def test_an_engine_of_another_precision_than_requested_is_an_error():
    half = {"Layers": TENSORRT_11["Layers"] + TENSORRT_11["Layers"][:1]}  # two of three are FP16
    assert check_inspected(json.dumps(half), "fp16").float16 == 2
    message = (
        r"built in fp16, but fp32 was requested: 2 of 3 outputs, according to its inspector\. "
        r"Report it with hipa-doctor --self-test"
    )
    with pytest.raises(HipaError, match=message):
        check_inspected(json.dumps(half), "fp32")
    assert check_inspected("{}", "fp16") is None


def layer(kind: str, dtype: str) -> dict[str, object]:
    return {"Name": kind, "LayerType": kind, "Outputs": [{"Name": "t", "Format/Datatype": dtype}]}


def test_what_lies_between_the_products_does_not_count():
    """Normalisations and the arithmetic of the step compute in FP32 on purpose."""
    layers = [layer("gemm", "Half"), layer("CaskConvolution", "Half"), layer("gemm", "Float")]
    layers += [layer("kgen", "Float")] * 5
    check = check_inspected(json.dumps({"Layers": layers}), "fp16")
    assert (check.float16, check.float32) == (2, 1)


def test_an_engine_in_one_piece_says_nothing():
    """The UNet's output is FP32, also where it computes in FP16."""
    layers = [layer("Reformat", "Row major linear FP32"), layer("Myelin", "Row major linear FP32")]
    assert check_inspected(json.dumps({"Layers": layers}), "fp16") is None


@pytest.mark.parametrize(
    "text", ["", "{}", '{"Layers": ["a", "b"]}', '{"Layers": [{"Name": "a"}]}']
)
def test_a_report_without_types_gives_no_check(text):
    assert parse_inspector(text) is None


def test_a_loaded_engine_says_what_its_activations_take():
    inspector = SimpleNamespace(get_engine_information=lambda kind: "{}")
    loaded = SimpleNamespace(create_engine_inspector=lambda: inspector, device_memory_size_v2=5)
    trt = ModuleType("trt")
    trt.LayerInformationFormat = SimpleNamespace(JSON=1)
    trt.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda engine: loaded if engine else None
    )
    assert inspect(trt, None, b"engine") == ("{}", 5)
    assert inspect(trt, None, b"") == ("", None)
