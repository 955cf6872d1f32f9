"""The inspector's JSON, in the two forms that NVIDIA documents (written by hand: no engine can be read here)."""

from __future__ import annotations

import json

import pytest

from hipa_deploy.engines.precision import parse_inspector

TENSORRT_10 = {
    "Layers": [
        {"Name": "a", "Outputs": [{"Name": "t", "Format/Datatype": "Row major linear FP16 format"}]},
        {"Name": "b", "Outputs": [{"Name": "u", "Format/Datatype": "Row major linear FP32"}]},
        {"Name": "c", "Outputs": [{"Name": "v", "Format/Datatype": "Row major linear UInt8 format"}]},
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
def test_both_forms(report):
    check = parse_inspector(json.dumps(report))
    assert (check.by, check.float16, check.float32) == ("inspector", 1, 1)


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["a", "b"]}', '{"Layers": [{"Name": "a"}]}'])
def test_no_types_is_no_answer(text):
    assert parse_inspector(text) is None
