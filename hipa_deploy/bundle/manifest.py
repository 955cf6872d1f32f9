"""The bundle: ONNX stages, tokenizer, reference tensors and ``hipa.json``, portable to any machine.

The format is described in docs/reference/bundle.md. Every file is listed with its SHA-256 and checked before use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hipa_deploy.tasks import Task

MAX_BATCH = 64

DType = Literal["float16", "float32", "int64", "uint8"]
Precision = Literal["fp16", "fp32"]
Layout = Literal["onestep", "generic"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Axis(_Model):
    """Sizes of a named dimension: multiples of ``multiple`` from ``min`` to ``max``; ``opt`` is the usual one."""

    min: int = Field(ge=1)
    opt: int
    max: int
    multiple: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= self.opt <= self.max or any(
            n % self.multiple for n in (self.min, self.opt, self.max)
        ):
            raise ValueError(
                f"{self.min}:{self.opt}:{self.max} is not min <= opt <= max in steps of {self.multiple}"
            )
        return self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max and size % self.multiple == 0

    def __str__(self) -> str:
        steps = f" in steps of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.min} to {self.max}{steps}"


class TensorSpec(_Model):
    """A named tensor at a stage's edge. A dimension is a number, or names one of the stage's axes."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape when the named axes have ``sizes``."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


class StageSpec(_Model):
    """What goes into a stage and what comes out, in the ONNX graph's order. No ``axes``: every shape is static."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: dict[str, Axis] = {}

    def sizes(self, which: Literal["min", "opt", "max"]) -> dict[str, int]:
        """The smallest, usual or largest size of every axis."""
        return {name: getattr(axis, which) for name, axis in self.axes.items()}


class Parity(_Model):
    """From the reference prompt to a stage's output: ONNX Runtime on the CPU against PyTorch FP32.

    Errors accumulate: a stage is fed what the ONNX stages before it gave. ONNX Runtime on a CPU computes each FP16
    node in FP32 and rounds its output: close to a GPU's arithmetic, and not the same.
    ``high_frequency_ratio`` is the energy of the Laplacian over the reference's; None for tensors without rows
    and columns.
    """

    max_abs: float
    mean_abs: float
    cosine: float
    psnr_db: float
    high_frequency_ratio: float | None = None


class Cost(_Model):
    """What one call of a stage takes at its specified shapes, from the ONNX graph itself.

    ``flops`` counts a multiplication and an addition as two, in Conv, MatMul and Gemm; the rest is a few per cent.
    ``weight_bytes`` and ``io_bytes`` (inputs and outputs of the stage) are what must cross the memory bus at least.
    ``activation_bytes`` is the most that the tensors between layers hold at once, at the stage's largest shapes, when
    none is fused away; None where a shape is unknown, and in older bundles.
    """

    flops: int = Field(ge=0)
    weight_bytes: int = Field(ge=0)
    io_bytes: int = Field(ge=0)
    activation_bytes: int | None = Field(default=None, ge=0)


class Stage(_Model):
    """One ONNX file and what is known of it."""

    spec: StageSpec
    path: str
    precision: Precision
    opset: int
    fp32_islands: tuple[str, ...] = ()
    parity: Parity
    cost: Cost | None = None


class ModelInfo(_Model):
    """The base model: where it came from and what its weights hash to."""

    name: str
    sha256: str


class AdaptorInfo(_Model):
    """The adaptor merged into the UNet, and the scale it was merged at."""

    name: str
    sha256: str
    rank: int
    alpha: float
    scale: float


class DecoderInfo(_Model):
    """What decodes: the model's own VAE ('full'), or an AutoencoderTiny ('tiny') with the hash of its weights."""

    kind: Literal["full", "tiny"]
    name: str
    sha256: str


class EncoderInfo(DecoderInfo):
    """The same of what encodes the source image of a task that has one; ``adaptor_sha256``, where that is adapted."""

    adaptor_sha256: str | None = None


class Strength(_Model):
    """A strength of an edit, and the constants of the step that starts there."""

    strength: float = Field(gt=0, le=1)
    timestep: int
    alpha_bar: float


class OneStep(_Model):
    """The constants of the step. Latents are [C, H, W] = [latent_channels, height / 2**n, width / 2**n]."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    timestep: int
    alpha_bar: float
    scaling_factor: float
    latent_shape: tuple[int, int, int]
    height: int
    width: int


class Manifest(_Model):
    """``hipa.json``.

    ``strengths`` are an edit's, descending, the first with the constants of ``one_step``; ``upscale`` is how many times
    larger super-resolution makes an image. Both are empty for other tasks.
    """

    schema_version: Literal[1]
    producer: str
    layout: Layout
    precision: Precision
    batch: int = Field(ge=1, le=MAX_BATCH)
    base_model: ModelInfo
    adaptor: AdaptorInfo | None
    decoder: DecoderInfo | None = None
    encoder: EncoderInfo | None = None
    task: Task = "generate"
    strengths: tuple[Strength, ...] = ()
    upscale: int | None = None
    one_step: OneStep
    stages: tuple[Stage, ...] = Field(min_length=1)
    end_to_end: Parity
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in map(PurePosixPath, files):
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{name} lies outside the bundle")
        return files
