"""The time of each stage, as the host waits for it and as the device measures it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

END_TO_END = "end to end"  # the name of the whole run, beside the names of its stages


class StageTimer:
    """Adds up seconds by stage.

    Args:
        runners: by stage. A runner that measures its device has ``device_ms``, the milliseconds of
            its latest call, or None.

    Example:
        >>> timer = StageTimer()
        >>> with timer("unet"):
        ...     unet(**feed)
        >>> timer.seconds
        {'unet': 0.0021}

    """

    def __init__(self, runners: Mapping[str, object] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._runners = runners or {}
        self._device: dict[str, float] = {}
        self._device_incomplete = False

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as ``stage``; a stage that runs twice adds up.

        Runners return host arrays, so no work is left running on a GPU at the end of the block.
        """
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self._add_device_times(stage)

    def _add_device_times(self, block: str) -> None:
        """Read what the device measured, right after the block that it belongs to.

        Later is too late: runners that share a device know the time of their latest call only.
        """
        # A block that has no runner of its name is a call that runs several of them.
        names = [block] if block in self._runners else list(self._runners)
        measured = False
        for name in names:
            ms = getattr(self._runners[name], "device_ms", None)
            if ms is not None:
                self._device[name] = self._device.get(name, 0.0) + ms / 1e3
                measured = True
        # One block that no runner measured makes every sum of device times too small.
        if not measured:
            self._device_incomplete = True

    @property
    def device_seconds(self) -> dict[str, float]:
        """Seconds by stage on the device; empty if the device did not measure every block."""
        return {} if self._device_incomplete else self._device
