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
    """The phases of a build by name, as TensorRT reports them to an ``IProgressMonitor``.

    The methods may be called from any thread.

    Example:
        >>> tree = PhaseTree()
        >>> tree.start("build", None, 2)
        >>> tree.step("build", 0)
        >>> tree.fraction
        0.5

    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._best = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase of ``steps`` steps, inside a step of ``parent`` or on its own."""
        with self._lock:
            # At least 1, because the fraction divides by it.
            self._phases[name] = _Phase(max(steps, 1), parent)

    def step(self, name: str, step: int) -> None:
        """Complete step ``step``, counted from 0, of a phase."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._best = max(self._best, self._fraction(name))

    def finish(self, name: str) -> None:
        """End a phase, whether or not all its steps were reported."""
        with self._lock:
            self._phases.pop(name, None)

    @property
    def fraction(self) -> float:
        """The share of the build that is done, 0 to 1."""
        return self._best

    def _fraction(self, name: str | None) -> float:
        """The share of the build that is done, according to one phase.

        The phase is a share of a step of its parent, the parent a share of a step of its own
        parent, and so on. The result is 0 for a phase whose parent has ended, because it then says
        nothing about the whole build.
        """
        fraction = 0.0
        visited = set[str]()
        # A phase that was reported as its own ancestor would otherwise loop forever.
        while name in self._phases and name not in visited:
            visited.add(name)
            phase = self._phases[name]
            fraction = min((phase.done + fraction) / phase.steps, 1.0)
            name = phase.parent
        return fraction if name is None else 0.0
