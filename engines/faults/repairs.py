"""What was changed in a build because TensorRT would give a wrong engine otherwise."""

from __future__ import annotations

from pydantic import Field

from hipa_deploy.record import Record


class Repairs(Record):
    """Changes to a build that mend an engine; a part of the engine's key.

    Attributes:
        known_faults: ids of faults in ``known_faults.toml`` whose remedy is among the other fields.
        myelin: options for TensorRT's compiler Myelin, which turn a fusion off.
        barriers: tensors that are outputs of the engine, and that nobody reads: TensorRT fuses no
            layers across an output.
        islands: blocks that compute in float32; 'attention' is every attention's products.
        optimization_level: 0 to 5, in place of the level of the build's options.

    """

    known_faults: tuple[str, ...] = ()
    myelin: tuple[str, ...] = ()
    barriers: tuple[str, ...] = Field(default=(), max_length=100)
    islands: tuple[str, ...] = Field(default=(), max_length=1000)
    optimization_level: int | None = Field(default=None, ge=0, le=5)

    @property
    def any(self) -> bool:
        """Whether anything was changed."""
        return self != Repairs()

    def __str__(self) -> str:
        parts = []
        if self.known_faults:
            parts.append(f"known faults {', '.join(self.known_faults)}")
        if self.myelin:
            parts.append(f"Myelin {' '.join(self.myelin)}")
        if self.barriers:
            parts.append(f"outputs {', '.join(self.barriers)}")
        if self.islands:
            parts.append(f"float32 in {', '.join(self.islands)}")
        if self.optimization_level is not None:
            parts.append(f"optimization level {self.optimization_level}")
        return "; ".join(parts) or "none"
