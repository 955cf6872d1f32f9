"""Run an exported stage once, in a process of its own: its memory is given back whole, and never adds to PyTorch's.

Graph optimisations are off. They would cost more than the one run does, and they remove the roundings to float16
between nodes, which are what an FP16 graph has to be judged by: so run, a value that overflows is infinite here too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.errors import HipaError


def run_apart(path: Path, spec: StageSpec, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of the stage at ``path`` on ``feed``, from ONNX Runtime on the CPU.

    Raises:
        HipaError: ONNX Runtime cannot load or run the graph, or the process was killed (out of memory).

    """
    with tempfile.TemporaryDirectory() as scratch:
        feed_path, out_path = Path(scratch, "feed.npz"), Path(scratch, "out.npy")
        np.savez(feed_path, **feed)  # type: ignore[arg-type]  # numpy's stub
        command = [
            sys.executable,
            "-m",
            __name__,
            str(path),
            spec.model_dump_json(),
            str(feed_path),
            str(out_path),
        ]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise HipaError(
                words[-1] if words else f"{spec.name}: its run ended with status {done.returncode}."
            )
        return np.load(out_path)


def _main(path: str, spec: str, feed: str, out: str) -> None:
    from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner

    stage = StageSpec.model_validate_json(spec)
    with (
        OnnxRuntimeRunner(Path(path), stage, "onnxruntime", optimise=False) as runner,
        np.load(feed) as tensors,
    ):
        np.save(out, runner(**tensors)[stage.outputs[0].name])


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except HipaError as error:
        sys.exit(str(error))
