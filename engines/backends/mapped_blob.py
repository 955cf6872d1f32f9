"""A compiled model of OpenVINO's, mapped, whose pages are given back while it is loaded.

OpenVINO copies the weights of a compiled model into the order that the processor multiplies
fastest. Until the system is short of memory, the pages that it read stay with the process too, so
each weight is there twice. When the mapping is this module's own, its pages can be given back at
any time: a page that is read again comes from the file once more. The mapping allows no writing,
so there is nothing in it to lose.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.errors import HipaError

# Each time costs the reading of pages that are wanted again; at 0.25 s that was not measurable.
_EVERY = 0.25  # seconds
# OpenVINO's cache puts one line of XML before what a plugin exported.
_START = b'<?xml version="1.0"?><compiled_blob '
_LONGEST_LINE = 1 << 16


class MappedBlob:
    """A file of OpenVINO's cache. It has to be kept as long as the model that is made of it.

    Args:
        folder: of the cache, with one file.

    Raises:
        HipaError: there is no such file, or more than one, or it does not start as expected.
        OSError: it cannot be read.

    """

    def __init__(self, folder: Path) -> None:
        paths = list(folder.glob("*.blob"))
        if len(paths) != 1:
            raise HipaError(f"{folder} has {len(paths)} compiled models. Expected one.")
        with paths[0].open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        line = self._map.find(b"\n", 0, _LONGEST_LINE) + 1
        if self._map[: len(_START)] != _START or not line:
            raise HipaError(f"{paths[0]} is no file of OpenVINO's cache.")
        self._start = line

    def tensor(self, openvino: Any) -> Any:
        """What the plugin exported, as an OpenVINO tensor of bytes that shares the mapping."""
        first = np.frombuffer(self._map, np.uint8).ctypes.data + self._start
        size = len(self._map) - self._start
        # OpenVINO takes no array that is read-only, and does not write into this one.
        content = (ctypes.c_ubyte * size).from_address(first)
        return openvino.Tensor(np.ctypeslib.as_array(content), shared_memory=True)

    @contextmanager
    def letting_go(self) -> Iterator[None]:
        """Give the pages back again and again in the block, and once at its end."""
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(_EVERY):
                self._release()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()
            self._release()

    def _release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such call
            self._map.madvise(mmap.MADV_DONTNEED)
