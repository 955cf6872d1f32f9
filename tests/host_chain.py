"""A stand-in for the chain of stages that a TensorRT runner is."""

from __future__ import annotations

import numpy as np


class HostChain:
    """A chain of stages as a TensorRT runner is one, but through ONNX Runtime; notes what it was fed and asked."""

    def __init__(self, runners: dict) -> None:
        self.runners, self.log = runners, []

    def run(self, inputs: dict, outputs: tuple[str, ...]) -> dict:
        self.log.append((sorted(inputs), outputs))
        known = dict(inputs)
        for runner in self.runners.values():
            if not {t.name for t in runner.spec.outputs} <= known.keys():
                known |= runner(**{t.name: known[t.name] for t in runner.spec.inputs})
        return {name: known[name] for name in outputs}

    def run_device(self, **inputs: np.ndarray) -> dict:
        return self.run(inputs, ("images",))
