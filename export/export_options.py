"""What to export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hipa_deploy.bundle.manifest import Axis, Layout, Precision
from hipa_deploy.tasks import Task


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    ``dtype`` is the precision of weights and arithmetic inside the graphs; ``height`` and ``width`` are pixels
    (None: the size the model was trained for); ``batch`` is the images a call makes, static. ``fuse`` puts UNet and
    decoder into one stage, 'generator'. ``decoder`` None is the model's own; otherwise an AutoencoderTiny folder.
    ``prompts`` is a text file, one prompt a line: the bundle then holds their text contexts in place of the text
    encoder, and takes no others. ``dynamic`` has the axes 'batch', 'height' and 'width' that are not static, in
    images and pixels. ``task`` None is the adaptor's own, generate without one; ``strengths`` are an edit's, of which
    an adaptor has its own; ``encoder`` None is the model's, otherwise an AutoencoderTiny folder.
    """

    model: str
    out: Path
    adaptor: Path | None = None
    adaptor_scale: float = 1.0
    dtype: Precision = "fp16"
    layout: Layout = "onestep"
    height: int | None = None
    width: int | None = None
    batch: int = 1
    fuse: bool = False
    decoder: Path | None = None
    prompts: Path | None = None
    dynamic: Mapping[str, Axis] = field(default_factory=dict)
    task: Task | None = None
    strengths: tuple[float, ...] = ()
    encoder: Path | None = None

    def size(self, name: Literal["batch", "height", "width"]) -> int | None:
        """The size to reference: a dynamic axis' usual one, or the static one that was asked for."""
        return self.dynamic[name].opt if name in self.dynamic else getattr(self, name)
