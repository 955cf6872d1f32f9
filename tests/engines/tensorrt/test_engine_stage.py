"""The profiler of a stage, on the real TensorRT-RTX. Stages run in test_tensorrt_runner.py."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.tensorrt.engine_stage import layer_profiler


def test_the_profiler_is_one_for_the_real_tensorrt():
    trt = pytest.importorskip("tensorrt_rtx")
    profiler = layer_profiler(trt)
    profiler.report_layer_time("conv", 0.5)
    assert isinstance(profiler, trt.IProfiler)
    assert profiler.layers == [("conv", 0.5)]
