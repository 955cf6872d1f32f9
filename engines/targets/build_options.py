"""What a build may spend, and what it should keep open."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

_RANGES = {
    "optimization_level": (0, 5),
    "workspace_mib": (1, 1 << 20),
    "tactic_dram_mib": (256, 1 << 20),
    "max_aux_streams": (0, 64),
}


class BuildOptions(Record):
    """What the builder may spend. None leaves TensorRT's own default.

    ``workspace_mib`` is the scratch memory on the GPU that a layer may take, ``tactic_dram_mib`` the host memory that
    the builder may take on a device whose memory is shared. ``refit``: the engine's weights can be exchanged later.

    Raises:
        HipaError: a value out of range.

    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    tactic_dram_mib: int | None = None
    max_aux_streams: int | None = None
    refit: bool = False
    timing_cache: Path | None = Field(
        default=None, exclude=True
    )  # a hint for the build, no part of the key

    @model_validator(mode="after")
    def _in_range(self) -> BuildOptions:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise HipaError(f"{name} is {value}. Expected {low} to {high}.")
        return self

    def or_else(self, defaults: BuildOptions) -> BuildOptions:
        """These options; where one is not set, the value in ``defaults``."""
        return defaults.model_copy(
            update={name: getattr(self, name) for name in self.model_fields_set}
        )

    def flags(self) -> list[str]:
        """The options of ``hipa-build`` that stand for these."""
        given = {
            "--optimization-level": self.optimization_level,
            "--workspace": self.workspace_mib,
            "--tactic-dram": self.tactic_dram_mib,
        }
        flags = [
            part
            for flag, value in given.items()
            if value is not None
            for part in (flag, str(value))
        ]
        return [*flags, "--refit"] if self.refit else flags
