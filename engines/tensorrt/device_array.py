"""An output that stays on the GPU: ``__cuda_array_interface__`` (version 3) and DLPack, without a library for either.

``torch.as_tensor``, ``cupy.asarray`` and numba take the first, ``torch.from_dlpack`` and the like the second; neither
copies.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hipa_deploy.errors import HipaError

CPU, CUDA = 1, 2  # DLDeviceType

_CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode
_NAME = b"dltensor"


@dataclass(frozen=True)
class DeviceArray:
    """A view of a runner's output buffer, C-contiguous.

    It is valid until the runner's next call or ``close``: exporting it later is an error, and an array that was made
    from it earlier then shows other data, or freed memory. Copy what is to live longer. ``stream`` is the CUDA stream
    that fills it; ``wait`` blocks until it is filled. Use it on the same GPU.
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
                "the device array is stale: its runner ran again or was closed. Copy it before that."
            )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The array for numba, cupy and torch; they wait for ``stream`` themselves.

        Raises:
            HipaError: the runner has run again since.

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
        """A DLPack capsule, unversioned, filled whatever the consumer's ``stream``.

        Raises:
            HipaError: the runner has run again since.
            BufferError: a copy or another device is asked for.

        """
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
_DLManagedTensor._fields_ = (
    ("tensor", _DLTensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_alive: dict[int, tuple[Any, ...]] = {}  # by address: what a consumer still holds


@_Deleter
def _delete(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    [ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor],
)
_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.restype, _is_capsule.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = (
    ctypes.c_void_p,
    [ctypes.c_void_p, ctypes.c_char_p],
)


@_CapsuleDestructor
def _destroy_capsule(capsule: Any) -> None:
    """A capsule that nobody consumed (a consumer renames it) releases its tensor."""
    if _is_capsule(capsule, _NAME):
        _alive.pop(_capsule_pointer(capsule, _NAME), None)


def _capsule(array: DeviceArray) -> Any:
    rank = len(array.shape)
    shape = (ctypes.c_int64 * rank)(*array.shape)
    strides = (ctypes.c_int64 * rank)(*(math.prod(array.shape[axis + 1 :]) for axis in range(rank)))
    tensor = _DLTensor(
        array.pointer,
        *array.device,
        rank,
        _CODES[array.dtype.kind],
        array.dtype.itemsize * 8,
        1,
        shape,
        strides,
        0,
    )
    managed = _DLManagedTensor(tensor, None, _delete)
    _alive[ctypes.addressof(managed)] = (managed, shape, strides, array)
    return _new_capsule(ctypes.addressof(managed), _NAME, _destroy_capsule)
