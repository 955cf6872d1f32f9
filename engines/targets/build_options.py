"""What a build may use, and what the engine should stay open to."""

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
    """What the builder may use. None leaves TensorRT's own default.

    Args:
        optimization_level: 0 to 5; a higher one takes longer to build.
        workspace_mib: scratch memory on the GPU that a layer may take.
        tactic_dram_mib: host memory that the builder may take where memory is shared with the GPU.
        max_aux_streams: how many more streams an engine may use, 0 to 64.
        refit: the engine's weights can be exchanged later.
        timing_cache: a file that the build reads and extends. It only saves time, so it is no part
            of an engine's key.

    Raises:
        HipaError: a value out of its range.

    Example:
        >>> BuildOptions(optimization_level=5, refit=True).flags()
        ['--optimization-level', '5', '--refit']

    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    tactic_dram_mib: int | None = None
    max_aux_streams: int | None = None
    refit: bool = False
    timing_cache: Path | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _in_range(self) -> BuildOptions:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise HipaError(f"{name} is {value}. Expected {low} to {high}.")
        return self

    def or_else(self, defaults: BuildOptions) -> BuildOptions:
        """These options; where one was not set, the value in ``defaults``."""
        # Whatever was passed counts as chosen, also where it equals the default.
        chosen = {name: getattr(self, name) for name in self.model_fields_set}
        return defaults.model_copy(update=chosen)

    def flags(self) -> list[str]:
        """The options of ``hipa-build`` that stand for these."""
        # ``max_aux_streams`` has no option there. A timing cache changes no engine, only the time.
        values = {
            "--optimization-level": self.optimization_level,
            "--workspace": self.workspace_mib,
            "--tactic-dram": self.tactic_dram_mib,
        }
        flags = []
        for flag, value in values.items():
            if value is not None:
                flags += [flag, str(value)]
        if self.refit:
            flags.append("--refit")
        return flags
