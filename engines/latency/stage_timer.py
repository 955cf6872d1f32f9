"""Time by stage, the host's and the device's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StageTimer:
    """Collects seconds by stage: ``with timer("unet"): …``. A stage that runs twice adds up.

    ``device_seconds`` is what the device took, from ``runners`` that know: such a runner has ``device_ms``, the
    milliseconds of its latest call, or None. Empty as soon as one block is not told of.
    """

    def __init__(self, runners: Mapping[str, object] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._runners = runners or {}
        self._device: dict[str, float] = {}
        self._silent = False

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block. Runners return host arrays, so nothing is left running on a GPU at its end."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self._ask(stage)

    def _ask(self, block: str) -> None:
        """Read device times at once: runners that share a device know of the latest call alone.

        A block that is no runner's own name stands for a call that runs several of them.
        """
        names = [block] if block in self._runners else list(self._runners)
        told = {name: getattr(self._runners[name], "device_ms", None) for name in names}
        known = {name: ms for name, ms in told.items() if ms is not None}
        self._silent = self._silent or not known
        for name, ms in known.items():
            self._device[name] = self._device.get(name, 0.0) + ms / 1e3

    @property
    def device_seconds(self) -> dict[str, float]:
        """Seconds by stage on the device."""
        return {} if self._silent else self._device
