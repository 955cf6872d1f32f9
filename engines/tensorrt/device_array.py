"""An output that stays on the GPU, for other libraries to take without a copy.

It speaks ``__cuda_array_interface__`` (version 3) and DLPack, and needs no library for either.
``torch.as_tensor``, ``cupy.asarray`` and numba take the first, ``torch.from_dlpack`` and its like
the second.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hipa_deploy.errors import HipaError

# DLDeviceType of dlpack.h
CPU = 1
CUDA = 2

_CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode of dlpack.h, by numpy's kind
_NAME = b"dltensor"  # what the protocol calls a capsule that nobody has consumed yet


@dataclass(frozen=True)
class DeviceArray:
    """A view of a runner's output buffer on the GPU, C-contiguous.

    The view is valid until the runner's next call or its ``close``. Exporting it later is an error,
    and an array that was made from it earlier then shows other data, or freed memory: copy what is
    to live longer. Use it on the same GPU.

    Args:
        pointer: the device address.
        shape: the tensor's shape.
        dtype: the tensor's dtype.
        stream: the CUDA stream that fills it.
        wait: blocks until it is filled.
        current: whether the view is still valid.
        device: DLPack's device type and number.

    Example:
        >>> array = pipeline.stages.run_on_device(feed)["images"]  # uint8 [B, H, W, 3]
        >>> images = torch.as_tensor(array, device="cuda").clone()

    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: int
    wait: Callable[[], None]
    current: Callable[[], bool]
    device: tuple[int, int] = (CUDA, 0)

    def _check_current(self) -> None:
        if not self.current():
            raise HipaError(
                "the device array is stale: its runner ran again or was closed. "
                "Copy it before that."
            )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The array for numba, cupy and torch; they wait for ``stream`` themselves.

        Raises:
            HipaError: the runner has run again since, or was closed.

        """
        self._check_current()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": self.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule, unversioned. The array is filled by then, on whatever ``stream``.

        Raises:
            HipaError: the runner has run again since, or was closed.
            BufferError: the consumer asks for a copy or for another device.

        """
        # ``max_version`` is only the consumer's upper limit: it takes an unversioned capsule too.
        if copy or (dl_device is not None and tuple(dl_device) != self.device):
            raise BufferError(
                f"no copy is made, and the array stays on DLPack device {self.device}."
            )
        self._check_current()
        self.wait()
        return _capsule(self)


class _DLTensor(ctypes.Structure):
    """dlpack.h's DLTensor, with DLDevice and DLDataType written out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    """dlpack.h's DLManagedTensor."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))

# Set afterwards: the deleter takes a pointer to the very structure that holds it.
_DLManagedTensor._fields_ = (
    ("tensor", _DLTensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)

# What a consumer still holds, by the address of its _DLManagedTensor: Python must not free it.
_alive: dict[int, tuple[Any, ...]] = {}


@_Deleter
def _delete(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# CPython's functions for capsules; ctypes has to know the types of every pointer they take. Taken
# by index, each is our own: an attribute of ctypes.pythonapi is one object for the whole process,
# and another library that declares its types there (as py_object, say) would declare ours.
_new_capsule = ctypes.pythonapi["PyCapsule_New"]
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor]

_is_capsule = ctypes.pythonapi["PyCapsule_IsValid"]
_is_capsule.restype = ctypes.c_int
_is_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p]

_capsule_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]


@_CapsuleDestructor
def _destroy_capsule(capsule: Any) -> None:
    """Release the tensor of a capsule that nobody consumed; a consumer renames the capsule."""
    if _is_capsule(capsule, _NAME):
        _alive.pop(_capsule_pointer(capsule, _NAME), None)


def _capsule(array: DeviceArray) -> Any:
    """A DLPack capsule over the memory of ``array``."""
    rank = len(array.shape)
    shape = (ctypes.c_int64 * rank)(*array.shape)
    strides = (ctypes.c_int64 * rank)(*_strides(array.shape))
    device_type, device_id = array.device
    tensor = _DLTensor(
        data=array.pointer,
        device_type=device_type,
        device_id=device_id,
        ndim=rank,
        code=_CODES[array.dtype.kind],
        bits=array.dtype.itemsize * 8,
        lanes=1,
        shape=shape,
        strides=strides,
        byte_offset=0,
    )
    managed = _DLManagedTensor(tensor, None, _delete)
    address = ctypes.addressof(managed)
    # The tensor points into these arrays, so they live until the consumer calls the deleter.
    _alive[address] = (managed, shape, strides, array)
    return _new_capsule(address, _NAME, _destroy_capsule)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Strides of a C-contiguous array, in elements as DLPack counts them."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
