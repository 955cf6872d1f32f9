"""TensorBoard scalars of a training run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Scalars:
    """A TensorBoard writer as a context manager; without a folder it records nothing.

    Args:
        folder: Where the event file goes; None in a process that does not write. step: The step
        that the run resumes from. TensorBoard then hides values of later steps, which
            a killed run wrote after its last checkpoint.

    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step + 1) if folder else None

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.writer is None:
            return
        if kind is None:
            self.writer.close()
            return
        # Closing flushes, which fails too when a full disk was the cause. The first error says
        # more.
        with suppress(OSError):
            self.writer.close()

    def add(self, values: dict[str, float], step: int) -> None:
        """Record the values of a step, by name."""
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
