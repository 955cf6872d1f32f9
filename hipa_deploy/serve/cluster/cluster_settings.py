"""What decides how many replicas there are, and where."""

from __future__ import annotations

from dataclasses import dataclass

from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.runner import CPU_BACKENDS

_MOST = 10_000  # replicas of a bundle


@dataclass(frozen=True)
class ClusterSettings:
    """The replicas of every bundle.

    Attributes:
        least: replicas that always run, 1 or more.
        most: replicas that may run when many requests wait; ``least`` for a fixed number.
        cpus: CPU cores that Ray sets aside for a replica, 0 or more.
        gpus: GPUs of a replica; a fraction shares one. 0 for a backend of the CPU.
        waiting: requests of a replica, waiting or under way, above which another one is started;
            None is twice the bundle's largest batch.

    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    waiting: float | None = None

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            HipaError: one is out of range.

        """
        if not 1 <= self.least <= self.most <= _MOST:
            raise HipaError(
                f"--replicas is {self.least}:{self.most}. Expected N, or FEWEST:MOST, each from 1 "
                f"to {_MOST}."
            )
        if not 0 <= self.cpus <= _MOST:
            raise HipaError(f"--replica-cpus is {self.cpus:g}. Expected 0 to {_MOST}.")
        if not 0 <= self.gpus <= _MOST or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise HipaError(
                f"--replica-gpus is {self.gpus:g}. Expected a fraction of one GPU, or whole GPUs."
            )
        if self.waiting is not None and not self.waiting > 0:
            raise HipaError(f"--scale-at is {self.waiting:g}. Expected requests, above 0.")

    def check_backend(self, backend: str) -> None:
        """Check that the replicas get what their backend runs on.

        Raises:
            HipaError: a GPU's backend without a GPU, or 'auto'.

        """
        if backend == "auto":
            raise HipaError(
                "--backend auto could be another one on each machine, and their images would "
                "differ. Name one, such as --backend onnxruntime."
            )
        if backend not in CPU_BACKENDS and not self.gpus:
            raise HipaError(
                f"--backend {backend} needs a GPU, and a replica gets none. Give --replica-gpus 1."
            )


def replicas_from(text: str) -> tuple[int, int]:
    """The fewest and the most replicas of 'N' or 'FEWEST:MOST'.

    Raises:
        HipaError: neither.

    Example:
        >>> replicas_from("1:4")
        (1, 4)

    """
    least, colon, most = text.partition(":")
    try:
        return int(least), int(most if colon else least)
    except ValueError:
        raise HipaError(
            f"--replicas is {brief(text)}. Expected a number, or FEWEST:MOST such as 1:4."
        ) from None
