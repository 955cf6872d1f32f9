"""Run an exported stage once, in a process of its own.

The process gives all its memory back when it ends, so that PyTorch's peak does not grow by it.

Graph optimisations are off. They would cost more than the one run does, and they remove the
roundings to float16 between nodes, which are what an FP16 graph is judged by: run like this, a
value that overflows is infinite here too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.disk.files import temporary_folder
from hipa_deploy.errors import HipaError
from hipa_deploy.interrupts import die_with_parent


def run_apart(path: Path, spec: StageSpec, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Run a stage on the CPU with ONNX Runtime; gives its first output. See ``run_all_apart``.

    Example:
        >>> run_apart(bundle.stage_path("unet"), spec, {"noise": noise, "context": context}).shape
        (1, 4, 64, 64)

    """
    return run_all_apart(path, spec, feed)[spec.outputs[0].name]


def run_all_apart(
    path: Path, spec: StageSpec, feed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Run a stage on the CPU with ONNX Runtime.

    Args:
        path: the stage's ``model.onnx``.
        spec: its inputs and outputs.
        feed: a tensor for each input, by name.

    Returns:
        The stage's outputs, by name.

    Raises:
        HipaError: ONNX Runtime cannot load or run the graph, or the process was killed, as by a
            system that is out of memory.

    """
    with temporary_folder("hipa-export") as scratch:
        # Tensors travel as files: they can be larger than a pipe's buffer or a command line.
        feed_path = scratch / "feed.npz"
        out_path = scratch / "out.npz"
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
        status, printed = _run(command)
        if status:
            # The last line is the error's message. A process that was killed leaves none.
            lines = printed.strip().splitlines()
            if lines:
                raise HipaError(lines[-1])
            raise HipaError(f"{spec.name}: its run ended with status {status}.")
        with np.load(out_path) as outputs:
            return dict(outputs)


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command until it ends, or this process is interrupted or killed.

    Returns:
        Its exit status, and what it printed on stderr.

    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        # Nothing is written to its stdin: the pipe tells it when this process is gone.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log
        ) as process,
    ):
        try:
            status = process.wait()
        finally:
            process.kill()
        log.seek(0)
        return status, log.read()


def _main(path: str, spec: str, feed: str, out: str) -> None:
    """What the process does: run the stage on the tensors in ``feed`` and write its output."""
    from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner

    stage = StageSpec.model_validate_json(spec)
    runner = OnnxRuntimeRunner(Path(path), stage, "onnxruntime", optimise=False)
    with runner, np.load(feed) as tensors:
        outputs = runner(**tensors)
    np.savez(out, **outputs)  # type: ignore[arg-type]  # numpy's stub


if __name__ == "__main__":
    die_with_parent()
    try:
        _main(*sys.argv[1:])
    except HipaError as error:
        sys.exit(str(error))
