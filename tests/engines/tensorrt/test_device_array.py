"""The real DLPack, with numpy as the consumer.

numpy takes only memory on the CPU, so these arrays say that they lie there.
"""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

from hipa_deploy.engines.tensorrt import device_array
from hipa_deploy.engines.tensorrt.device_array import CPU, DeviceArray
from hipa_deploy.errors import HipaError


def on_cpu(memory: np.ndarray, current=lambda: True, wait=lambda: None) -> DeviceArray:
    return DeviceArray(
        memory.ctypes.data, memory.shape, memory.dtype, 7, wait, current, device=(CPU, 0)
    )


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32"])
def test_numpy_sees_the_same_memory_and_releases_it(dtype):
    memory = np.arange(24).astype(dtype).reshape(2, 3, 4)
    view = np.from_dlpack(on_cpu(memory))
    assert (view.dtype, view.shape, view.strides) == (memory.dtype, memory.shape, memory.strides)
    memory[1, 2, 3] = 77
    assert view[1, 2, 3] == 77
    assert len(device_array._alive) == 1
    del view
    gc.collect()
    assert device_array._alive == {}


def test_a_capsule_that_nobody_consumed_releases_its_tensor():
    capsule = on_cpu(np.zeros(3, np.float32)).__dlpack__(stream=1)
    assert len(device_array._alive) == 1
    del capsule
    gc.collect()
    assert device_array._alive == {}


def test_another_library_may_declare_its_own_types_for_the_capsules_functions(monkeypatch):
    for name in ("PyCapsule_New", "PyCapsule_IsValid", "PyCapsule_GetPointer"):
        shared = getattr(ctypes.pythonapi, name)
        monkeypatch.setattr(shared, "argtypes", [ctypes.py_object, ctypes.c_char_p])
    test_a_capsule_that_nobody_consumed_releases_its_tensor()


def test_a_consumer_receives_a_filled_array():
    memory = np.zeros(3, np.float32)
    array = on_cpu(memory, wait=lambda: memory.fill(5))
    assert np.from_dlpack(array).tolist() == [5, 5, 5]


def test_the_cuda_array_interface():
    memory = np.zeros((1, 2), np.float16)
    assert on_cpu(memory).__cuda_array_interface__ == {
        "shape": (1, 2),
        "typestr": "<f2",
        "data": (memory.ctypes.data, False),
        "strides": None,
        "version": 3,
        "stream": 7,
    }


@pytest.mark.parametrize("arguments", [{"copy": True}, {"dl_device": (2, 0)}])
def test_no_copy_and_no_other_device(arguments):
    with pytest.raises(BufferError, match="no copy is made"):
        on_cpu(np.zeros(3, np.float32)).__dlpack__(**arguments)


def test_a_stale_array_is_refused():
    array = on_cpu(np.zeros(3, np.float32), current=lambda: False)
    with pytest.raises(HipaError, match="stale"):
        np.from_dlpack(array)
    with pytest.raises(HipaError, match="stale"):
        array.__cuda_array_interface__  # noqa: B018
