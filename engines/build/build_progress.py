"""TensorRT's nested build phases as one fraction that never falls."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class _Phase:
    steps: int
    parent: str | None
    done: int = 0


class PhaseTree:
    """Phases by name, as an ``IProgressMonitor`` hears of them, from any thread."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._best = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins, within a step of ``parent`` or on its own."""
        with self._lock:
            self._phases[name] = _Phase(max(steps, 1), parent)

    def step(self, name: str, step: int) -> None:
        """Step ``step``, counted from 0, of a phase is complete."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._best = max(self._best, self._fraction(name))

    def finish(self, name: str) -> None:
        """A phase ends, whether or not all its steps were reported."""
        with self._lock:
            self._phases.pop(name, None)

    @property
    def fraction(self) -> float:
        """How much of the build is done, 0 to 1."""
        return self._best

    def _fraction(self, name: str | None) -> float:
        """How much is done, by one phase: its share of a step of its parent, and so on up.

        0 for a phase whose parent is over: it says nothing of the whole.
        """
        fraction, path = 0.0, set[str]()
        while name in self._phases and name not in path:
            path.add(name)
            phase = self._phases[name]
            fraction = min((phase.done + fraction) / phase.steps, 1.0)
            name = phase.parent
        return fraction if name is None else 0.0
