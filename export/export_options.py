"""The request of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hipa_deploy.bundle.manifest import Axis, Layout, Precision
from hipa_deploy.disk.text_paths import take_text_paths
from hipa_deploy.marks.records import Marks
from hipa_deploy.models.style import Style
from hipa_deploy.tasks import Task


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export. Paths may be text.

    Attributes:
        model: 'emoji', a diffusers folder or a hub id.
        out: the bundle's folder, which must be new or empty.
        adaptor: an adaptor folder; None exports the model as it is.
        adaptor_scale: 1.0 merges the adaptor as it was trained.
        dtype: precision of weights and arithmetic inside the graphs, fp16 or fp32.
        layout: onestep is specialised to one step; generic is what optimum loads.
        height: pixels; None is what the adaptor was trained at, or without one the model.
        width: the same.
        batch: images per call, static.
        fuse: UNet and decoder become one stage, 'generator'.
        decoder: an AutoencoderTiny folder; None is the model's own VAE.
        prompts: what ``read_prompt_file`` reads. The bundle then holds the contexts of these
            prompts in place of the text encoder, and takes no others.
        reference_prompts: what ``read_prompt_file`` reads. Up to 8 of these prompts judge every
            stage; None is one prompt of this package.
        dynamic: axes that are not static, of 'batch', 'height' and 'width', in images and pixels.
        task: None is the adaptor's own; generate without an adaptor. With a ControlNet: control.
        controlnet: a ControlNetModel folder; the bundle is then to follow control images.
        strengths: of an edit, in (0, 1]; empty means all that the adaptor was trained for.
        encoder: an AutoencoderTiny folder; None is the model's own VAE.
        context_tokens: of a text context, 77, 154 or 231; None is as the adaptor was trained, or
            as many as the text encoder reads at once.
        clip_skip: last layers of the text encoder that are left out; None is as the adaptor was
            trained, or 0.
        prompt_weights: whether ``(word:1.3)`` is a weight, in ``prompts`` and for the bundle's
            user; None is as the adaptor was trained, or no.
        style: LoRAs and embeddings that are added to the model before the adaptor.
        one_step: the step of a LoRA, or of a model, that others made: a preset of
            ``hipa_deploy.models.one_step`` or a .toml file. None is the adaptor's own step; without
            an adaptor of HiPA, x0 at the last timestep.
        with_teacher: put the base UNet, without the adaptor, into the bundle, to refine drafts.
        marks: how the bundle's images are marked.
        safety: export the model's safety checker, if it has one; the bundle then runs it.
        signing_key: the private key that signs the manifest; None leaves the bundle unsigned.

    Example:
        >>> ExportOptions(model="emoji", out=Path("bundle"), batch=2).size("batch")
        2

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
    reference_prompts: Path | None = None
    dynamic: Mapping[str, Axis] = field(default_factory=dict)
    task: Task | None = None
    controlnet: Path | None = None
    strengths: tuple[float, ...] = ()
    encoder: Path | None = None
    context_tokens: int | None = None
    clip_skip: int | None = None
    prompt_weights: bool | None = None
    style: Style = field(default_factory=Style)
    one_step: str | None = None
    with_teacher: bool = False
    marks: Marks = field(default_factory=Marks)
    safety: bool = True
    signing_key: Path | None = None

    def __post_init__(self) -> None:
        take_text_paths(self)

    def size(self, name: Literal["batch", "height", "width"]) -> int | None:
        """The size of the reference: the usual one of a dynamic axis, or the static one.

        None: what the adaptor was trained at, or without one the model.
        """
        if name in self.dynamic:
            return self.dynamic[name].opt
        static: int | None = getattr(self, name)
        return static
