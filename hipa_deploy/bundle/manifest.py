"""The records of ``hipa.json``, a bundle's manifest: the public format, version 1.

A bundle is ONNX stages, a tokenizer, reference tensors and this manifest, portable to any machine.
Every file is listed with its SHA-256 and checked before use. The format is described in
docs/reference/bundle.md.

Shapes: B batch, L tokens, D width of a text context, C latent channels, H W pixels, h w latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.disk.reading import name_problem, shown
from hipa_deploy.marks.records import Marks, SafetySettings
from hipa_deploy.record import Record
from hipa_deploy.tasks import Task

MAX_BATCH = 64
# Far beyond what an export writes. Larger numbers are mistakes, or are meant to fill a memory.
MAX_SIZE = 65536  # of a dimension of a tensor, and of an image's sides in pixels
MAX_ELEMENTS = 2**33  # of a tensor
MAX_COUNT = 2**62  # of bytes and operations
MAX_FILES = 10_000

DType = Literal["float16", "float32", "int64", "uint8"]
Precision = Literal["fp16", "fp32"]
Layout = Literal["onestep", "generic"]
TEACHER_STAGE = "teacher"  # the base UNet, which refines: not one of the stages of the one step
TEACHER_INPUTS = ("sample", "timestep", "encoder_hidden_states")
# Of SDXL's base UNet also the pooled vector and the six numbers of size and crop.
TEACHER_PAIR_INPUTS = (*TEACHER_INPUTS, "text_embeds", "time_ids")
PATH_STAGES = (
    "text_encoder", "text_encoder_2", "vae_encoder", "unet", "vae_decoder", "generator",
)  # fmt: skip
STAGE_NAMES = (*PATH_STAGES, "safety_checker", TEACHER_STAGE)


def _stage_name(name: str) -> str:
    # Engines and caches are named after the stage.
    if name not in STAGE_NAMES:
        known = ", ".join(STAGE_NAMES)
        raise ValueError(f"stage {shown(name)} is unknown, expected one of: {known}")
    return name


StageName = Annotated[str, AfterValidator(_stage_name)]
"""One of ``STAGE_NAMES``."""


def _file_name(name: str) -> str:
    problem = name_problem(name)
    if problem:
        raise ValueError(f"the file name {shown(name)} {problem}")
    return name


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has a character that cannot be printed")
    return text


Text = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
"""A name for people or for a graph: one line."""
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]

FileName = Annotated[str, AfterValidator(_file_name)]
"""A file's path in its folder: relative, with '/', and never out of it."""


class Axis(Record):
    """The sizes that a named dimension may have.

    Attributes:
        min: the smallest, 1 or more.
        opt: the usual one, which an engine is tuned for.
        max: the largest.
        multiple: every size is a multiple of it.

    Example:
        >>> 512 in Axis(min=384, opt=512, max=768, multiple=64)
        True

    """

    min: Size
    opt: Size
    max: Size
    multiple: Size = 1

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        in_order = self.min <= self.opt <= self.max
        odd = [size for size in (self.min, self.opt, self.max) if size % self.multiple]
        if not in_order or odd:
            raise ValueError(
                f"{self.min}:{self.opt}:{self.max} is not min <= opt <= max "
                f"in steps of {self.multiple}"
            )
        return self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max and size % self.multiple == 0

    def __str__(self) -> str:
        steps = f" in steps of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.min} to {self.max}{steps}"


class TensorSpec(Record):
    """A named tensor at a stage's edge.

    Attributes:
        name: as the ONNX graph has it.
        dtype: numpy's name of its type.
        shape: each dimension is a number, or the name of one of the stage's axes.

    """

    name: Name
    dtype: DType
    shape: tuple[Size | Name, ...] = Field(max_length=8)

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape when the named axes have ``sizes``.

        Example:
            >>> noise = TensorSpec(name="noise", dtype="float32", shape=("batch", 4, 64, 64))
            >>> noise.at({"batch": 2})
            (2, 4, 64, 64)

        """
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


class StageSpec(Record):
    """What goes into a stage and what comes out.

    Attributes:
        name: text_encoder, text_encoder_2 (SDXL's, in layout generic), vae_encoder, unet,
            vae_decoder, generator (UNet and decoder in one), or teacher (the base UNet of a bundle
            that refines).
        inputs: in the ONNX graph's order.
        outputs: in the ONNX graph's order.
        axes: dimensions that are not static, by name; empty if every shape is static.

    """

    name: Name
    inputs: tuple[TensorSpec, ...] = Field(min_length=1, max_length=32)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1, max_length=64)
    axes: dict[Name, Axis] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _whole(self) -> StageSpec:
        tensors = self.inputs + self.outputs
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("two of its tensors have one name")
        for tensor in tensors:
            unknown = [size for size in tensor.shape if size not in self.axes]
            named = [size for size in unknown if isinstance(size, str)]
            if named:
                raise ValueError(f"{tensor.name} has the dimension {named[0]!r}, which is no axis")
            elements = math.prod(tensor.at(self.sizes("max")))
            if elements > MAX_ELEMENTS:
                raise ValueError(
                    f"{tensor.name} has {elements} elements, expected at most {MAX_ELEMENTS}"
                )
        return self

    def sizes(self, which: Literal["min", "opt", "max"]) -> dict[str, int]:
        """The smallest, usual or largest size of every axis."""
        return {name: getattr(axis, which) for name, axis in self.axes.items()}


class Parity(Record):
    """How near a stage's output is to PyTorch FP32's, from the reference prompt on.

    In a manifest it was measured with ONNX Runtime on the CPU. Errors accumulate: a stage is fed
    what the ONNX stages before it gave. ONNX Runtime on a CPU computes each FP16 node in FP32 and
    rounds its output, which is close to a GPU's arithmetic and not the same.

    Attributes:
        max_abs: the largest error, in the tensor's own units.
        mean_abs: the mean error, in the tensor's own units.
        cosine: of the angle between the two, 1 if they agree.
        psnr_db: dB, relative to the reference's range (255 for uint8), at most 200.
        high_frequency_ratio: energy of the Laplacian over the reference's; None for tensors without
            rows and columns.

    """

    max_abs: float
    mean_abs: float
    cosine: float
    psnr_db: float
    high_frequency_ratio: float | None = None


class Cost(Record):
    """What one call of a stage takes at its specified shapes, from the ONNX graph itself.

    Attributes:
        flops: floating-point operations in Conv, MatMul and Gemm, a multiplication and an addition
            counted as two. All other operators are a few per cent.
        weight_bytes: bytes of the weights, which must cross the memory bus at least once.
        io_bytes: bytes of the stage's inputs and outputs, which must cross it too.
        activation_bytes: the most bytes that the tensors between layers hold at once, at the
        stage's
            largest shapes, when none is fused away. None where a shape is unknown, and in older
            bundles.
        fused_activation_bytes: the same where no attention that can be fused stores its scores.
            None where a shape is unknown, and in older bundles.

    """

    flops: Count
    weight_bytes: Count
    io_bytes: Count
    activation_bytes: Count | None = None
    fused_activation_bytes: Count | None = None

    @property
    def engine_activation_bytes(self) -> int | None:
        """What is known best of the activations of an engine, which fuses attentions."""
        if self.fused_activation_bytes is None:
            return self.activation_bytes
        return self.fused_activation_bytes


class Stage(Record):
    """One ONNX file and what is known of it.

    Attributes:
        spec: its inputs and outputs.
        path: the file, relative to the bundle.
        precision: of weights and arithmetic inside the graph.
        opset: ONNX operator set.
        fp32_islands: modules that stay in float32 inside an FP16 graph.
        parity: against PyTorch FP32, measured at the export.
        cost: what one call takes; None in older bundles.

    """

    spec: StageSpec
    path: FileName
    precision: Precision
    opset: int = Field(ge=1, le=1000)
    fp32_islands: tuple[Text, ...] = Field(default=(), max_length=100_000)
    parity: Parity
    cost: Cost | None = None

    @field_validator("spec")
    @classmethod
    def _known(cls, spec: StageSpec) -> StageSpec:
        _stage_name(spec.name)
        return spec


class ModelInfo(Record):
    """The base model.

    Attributes:
        name: a hub id, 'emoji', or the name of a local folder.
        sha256: of the UNet's weights, to which an adaptor is bound.

    """

    name: Text
    sha256: Text


class AdaptorInfo(Record):
    """The adaptor that was merged into the UNet.

    Attributes:
        name: of its folder.
        sha256: of its weights' file.
        rank: of its low-rank matrices; the largest, if layers differ.
        alpha: the change of a weight is scaled by alpha / rank.
        scale: what it was merged at; 1 is as trained.

    """

    name: Text
    sha256: Text
    rank: int = Field(ge=0, le=1_000_000)
    alpha: Finite
    scale: Finite


class LoraInfo(Record):
    """A LoRA that was merged into the base model, before any adaptor.

    Attributes:
        name: of its file or folder.
        sha256: of its file; of the hashes of several.
        scale: what it was merged at; 1 is as trained.
        rank: of its low-rank matrices; the largest, if layers differ; None without such matrices.
        parts: of the model that it changes: 'unet', 'text_encoder'.

    """

    name: Text
    sha256: Text
    scale: Finite
    rank: int | None = Field(default=None, ge=1, le=1_000_000)
    parts: tuple[Text, ...] = ()


class EmbeddingInfo(Record):
    """A textual inversion embedding: a word that was added to the text encoder.

    Attributes:
        name: of its file.
        sha256: of its file.
        token: the word that stands for it in a prompt.
        vectors: how many tokens of a prompt it takes.

    """

    name: Text
    sha256: Text
    token: Name
    vectors: int = Field(ge=1, le=1000)


class DecoderInfo(Record):
    """What decodes the latents.

    Attributes:
        kind: the model's own VAE ('full'), or an AutoencoderTiny ('tiny').
        name: of its folder, or owner/name of its repository in the hub's cache.
        sha256: of its weights.

    """

    kind: Literal["full", "tiny"]
    name: Text
    sha256: Text


class EncoderInfo(DecoderInfo):
    """What encodes the source image of a task that has one: the same fields as of a decoder.

    Attributes:
        adaptor_sha256: of the adaptor's part on this encoder; None where there is none.

    """

    adaptor_sha256: Text | None = None


class ControlInfo(Record):
    """The ControlNet whose blocks are added to the UNet's, of the task control.

    Attributes:
        name: of its folder, or owner/name of its repository in the hub's cache.
        sha256: of its weights.

    """

    name: Text
    sha256: Text


Timestep = Annotated[int, Field(ge=0, le=1_000_000)]
AlphaBar = Annotated[float, Field(ge=0, le=1)]


class Strength(Record):
    """A strength of an edit, and the constants of the step that starts there.

    Attributes:
        strength: in (0, 1], how much of the image may change.
        timestep: where the step starts, 0 to 999 of Stable Diffusion's schedule.
        alpha_bar: cumulative signal power at that timestep, in (0, 1].

    """

    strength: float = Field(gt=0, le=1)
    timestep: Timestep
    alpha_bar: AlphaBar


class StepMethod(Record):
    """A one-step method that is not HiPA's, as numbers.

    With e the noise of a seed, standard normal, the UNet sees z = noise_scale * e, and the step
    gives sample_factor * z + output_factor * (what the UNet predicts).

    Attributes:
        name: of the preset, or of the TOML file, that the numbers come from.
        scheduler: the class of diffusers that takes this step.
        noise_scale: above 0.
        sample_factor: of what the UNet saw.
        output_factor: of what the UNet predicts.

    """

    name: str
    scheduler: str
    noise_scale: float = Field(gt=0, allow_inf_nan=False)
    sample_factor: float = Field(allow_inf_nan=False)
    output_factor: float = Field(allow_inf_nan=False)


class OneStep(Record):
    """The constants of the one step.

    Attributes:
        prediction_type: what the UNet predicts.
        timestep: where the step starts, 0 to 999 of Stable Diffusion's schedule.
        alpha_bar: cumulative signal power at that timestep, in [0, 1].
        scaling_factor: the VAE's latents times this are the UNet's.
        latent_shape: [C, h, w] = [latent channels, height / 2**n, width / 2**n].
        height: of an image, in pixels.
        width: of an image, in pixels.
        method: how latents are made, where it is not HiPA's x0; None in older bundles.

    """

    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    timestep: Timestep
    alpha_bar: AlphaBar
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)
    latent_shape: tuple[Size, Size, Size]
    height: Size
    width: Size
    method: StepMethod | None = None

    @property
    def noise_scale(self) -> float:
        """Standard normal noise times this is what the UNet sees."""
        return self.method.noise_scale if self.method else 1.0


class RefineSettings(Record):
    """How the base model makes an image in many steps.

    Attributes:
        sampler: 'dpmsolver++' (second order, multi-step) or 'ddim'.
        steps: of the sampler, 2 to 1000.
        guidance: of classifier-free guidance, 1 to 30; 1 is the prompt's prediction alone.

    """

    sampler: Literal["ddim", "dpmsolver++"] = "dpmsolver++"
    steps: int = Field(default=25, ge=2, le=1000)
    guidance: float = Field(default=5.0, ge=1, le=30)


class Refinement(Record):
    """What a bundle refines its drafts with: the base model, as the adaptor's teacher was.

    Attributes:
        stage: the base UNet without the adaptor, called 'teacher': noisy latents, a timestep and a
            context come in, of SDXL also the pooled vector and six numbers; its prediction comes
            out.
        tables: a .npz file with ``alpha_bars`` float32 [T], of each timestep, and
            ``empty_context`` [1, L, D], the context of the empty prompt; of SDXL also
            ``empty_pooled`` [1, P].
        settings: the teacher's own, which are the default.

    """

    stage: Stage
    tables: FileName
    settings: RefineSettings

    @field_validator("stage")
    @classmethod
    def _teacher(cls, stage: Stage) -> Stage:
        if stage.spec.name != TEACHER_STAGE:
            raise ValueError(f"stage {stage.spec.name} refines, expected {TEACHER_STAGE}")
        names = tuple(tensor.name for tensor in stage.spec.inputs)
        known = (TEACHER_INPUTS, TEACHER_PAIR_INPUTS)
        if names not in known or len(stage.spec.outputs) != 1:
            expected = ", ".join(TEACHER_INPUTS)
            raise ValueError(f"stage {TEACHER_STAGE} takes {', '.join(names)}, expected {expected}")
        return stage

    @property
    def takes_pooled(self) -> bool:
        """Whether the base UNet takes a pooled vector and six numbers, as SDXL's does."""
        return len(self.stage.spec.inputs) == len(TEACHER_PAIR_INPUTS)


class SafetyStage(Record):
    """The model's safety checker: the network as a stage, and what surrounds it.

    Attributes:
        stage: pixels float32 [1, 3, S, S] -> cosines float32 [1, N].
        settings: how images are prepared, and the thresholds.

    """

    stage: Stage
    settings: SafetySettings

    @model_validator(mode="after")
    def _fits(self) -> SafetyStage:
        spec = self.stage.spec
        names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        if spec.name != "safety_checker" or names != ["pixels", "cosines"]:
            raise ValueError(f"stage {shown(spec.name)} is no safety checker")
        settings = self.settings
        cosines = len(settings.special_thresholds) + len(settings.thresholds)
        shapes = (spec.inputs[0].shape, spec.outputs[0].shape)
        if shapes != ((1, 3, *settings.crop), (1, cosines)):
            raise ValueError(f"its settings do not fit a safety checker of {shapes}")
        return self


class Manifest(Record):
    """``hipa.json``.

    Attributes:
        schema_version: of this format.
        producer: the program and its version.
        layout: 'onestep' is specialised graphs, 'generic' has optimum's inputs and outputs.
        precision: inside the graphs.
        batch: images that a call makes where the batch is static; the usual number where it is not.
        base_model: the model that it came from.
        adaptor: merged into the UNet; None without one.
        loras: merged into UNet and text encoder before the adaptor, in this order.
        embeddings: words that were added to the text encoder.
        decoder: what decodes; None in older bundles.
        encoder: what encodes a source image; None for text to image.
        control: the ControlNet of the task control; None, and left out of the file, for others.
        task: what an image is made from.
        strengths: an edit's, largest first, the first with the constants of ``one_step``.
        upscale: how many times larger super-resolution makes an image; None for other tasks.
        one_step: the constants of the step.
        text: how prompts become contexts; in older bundles one chunk of 77 tokens.
        text_widths: of the contexts of several text encoders, which stand side by side, as in
            SDXL; empty, and left out of the file, for one text encoder.
        stages: in the order in which they run.
        safety: the safety checker, which sees every image; None where the model has none.
        marks: how images are marked.
        end_to_end: from the reference prompt to images.
        refine: the base model beside the one-step one; None, and left out of the file, without it.
        files: SHA-256 of every file, by its path in the bundle.

    """

    schema_version: Literal[1]
    producer: Text
    layout: Layout
    precision: Precision
    batch: int = Field(ge=1, le=MAX_BATCH)
    base_model: ModelInfo
    adaptor: AdaptorInfo | None
    loras: tuple[LoraInfo, ...] = ()
    embeddings: tuple[EmbeddingInfo, ...] = ()
    decoder: DecoderInfo | None = None
    encoder: EncoderInfo | None = None
    control: ControlInfo | None = None
    task: Task = "generate"
    strengths: tuple[Strength, ...] = Field(default=(), max_length=1000)
    upscale: int | None = Field(default=None, ge=1, le=64)
    one_step: OneStep
    text: TextSettings = TextSettings()
    text_widths: tuple[Size, ...] = Field(default=(), max_length=2)
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=len(PATH_STAGES))
    safety: SafetyStage | None = None
    marks: Marks = Marks()
    end_to_end: Parity
    refine: Refinement | None = None
    files: dict[FileName, Text] = Field(max_length=MAX_FILES)

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        """Fields that have to agree with each other."""
        names = [stage.spec.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have one name")
        if TEACHER_STAGE in names:
            raise ValueError(f"stage {TEACHER_STAGE} is among those of the one step")
        if self.refine and (self.task, self.layout) != ("generate", "onestep"):
            raise ValueError(f"task {self.task} in layout {self.layout} is not refined")
        if self.refine and self.refine.takes_pooled != bool(self.text_widths):
            raise ValueError(
                f"stage {TEACHER_STAGE} is of a model with another number of text encoders"
            )
        if "safety_checker" in names:
            raise ValueError("the safety checker stands among the stages")
        if bool(self.strengths) != (self.task == "edit"):
            raise ValueError(f"task {self.task} with {len(self.strengths)} strengths")
        if bool(self.control) != (self.task == "control"):
            raise ValueError(f"task {self.task} with the ControlNet {self.control}")
        if bool(self.upscale) != (self.task == "upscale"):
            raise ValueError(f"task {self.task} with upscale = {self.upscale}")

        # A latent cell is a square of pixels.
        step = self.one_step
        _, latent_h, latent_w = step.latent_shape
        pixels = step.height // latent_h
        if (latent_h * pixels, latent_w * pixels) != (step.height, step.width):
            raise ValueError(
                f"latents of {latent_h} x {latent_w} are no images of {step.height} x {step.width}"
            )
        return self

    def to_json(self) -> str:
        """The text of ``hipa.json``.

        A bundle that does not refine has no field of that: versions before it read it too. So it
        is with the widths of several text encoders, and with a ControlNet.
        """
        without = set()
        if not self.refine:
            without.add("refine")
        if not self.text_widths:
            without.add("text_widths")
        if not self.control:
            without.add("control")
        return self.model_dump_json(indent=2, exclude=without) + "\n"
