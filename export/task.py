"""What is exported: task, where its step starts, how prompts are encoded.

Each is as the adaptor was trained, or as requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hipa_deploy.bundle.manifest import OneStep, Strength
from hipa_deploy.bundle.text_settings import TextSettings, TextWishes, choose_text
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    METADATA,
    AdaptorMetadata,
    check_schedule,
    read_metadata,
)
from hipa_deploy.models.early_config import EarlyConfig
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.one_step_method import (
    OneStepMethod,
    check_fits,
    load_method,
    names_for,
)
from hipa_deploy.tasks import Task, strength_timestep, takes_source, unet_inputs

LAST_TIMESTEP = 999
DEFAULT_STRENGTHS = (0.5,)
DEFAULT_UPSCALE = 4


@dataclass(frozen=True)
class TaskSettings:
    """The task of a bundle and the constants that belong to it.

    Attributes:
        task: what the bundle makes an image from.
        timestep: where the one step starts; of an edit, at its largest strength.
        strengths: the strengths of an edit, largest first; empty for other tasks.
        upscale: how many times the task upscale enlarges; None for other tasks.
        method: the one-step method of others; None is HiPA's own.

    """

    task: Task = "generate"
    timestep: int = LAST_TIMESTEP
    strengths: tuple[Strength, ...] = ()
    upscale: int | None = None
    method: OneStepMethod | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the UNet stage's inputs, in order, but for SDXL's conditioning."""
        return self.inputs_with(conditioning=False)

    def inputs_with(self, *, conditioning: bool) -> tuple[str, ...]:
        """Names of the UNet stage's inputs, in order; see ``unet_inputs``."""
        return unet_inputs(self.task, len(self.strengths), conditioned=conditioning)

    def starts(self, step: OneStep) -> tuple[OneStep | Strength, ...]:
        """Timestep and alpha_bar of every start: one for each strength of an edit, else one."""
        return self.strengths or (step,)

    def timesteps(self, step: OneStep) -> list[int]:
        """The timestep of every start."""
        return [start.timestep for start in self.starts(step)]


def choose_task(options: ExportOptions, model: ModelParts) -> TaskSettings:
    """The task that ``options`` mean for ``model``.

    Args:
        options: the request; what it leaves open is taken from the adaptor's metadata.
        model: the base model that the adaptor must belong to.

    Raises:
        HipaError: there is no such adaptor, it belongs to another base model, task or strength, a
            strength is outside (0, 1] or given twice, an option is not for this task, or the
            one-step method is not for this model, adaptor or task.

    Example:
        >>> model = ModelParts.open("emoji")
        >>> choose_task(ExportOptions(model="emoji", out=Path("b"), task="inpaint"), model)
        TaskSettings(task='inpaint', timestep=999, strengths=(), upscale=None, method=None)

    """
    metadata = _adaptor_metadata(options.adaptor, model)

    # The options win where both name a task, but only to be checked: an adaptor knows one task.
    trained_task: Task = metadata.task if metadata else "generate"
    _check_control(options, trained_task)
    # A ControlNet guides the step that the adaptor learned to generate with.
    if options.controlnet is not None:
        trained_task = "control"
    task = options.task or trained_task
    if metadata and trained_task != task:
        raise HipaError(
            f"adaptor {options.adaptor} was trained to {metadata.task}, not to {task}. "
            f"Use an adaptor for {task}, or leave out --task."
        )
    _check_options(task, options)

    method = choose_method(options, model.config, metadata)
    if method is not None:
        if takes_source(task):
            raise HipaError(
                f"one-step method {method.name} is for the task generate, this is {task}. "
                "Leave out --one-step, or use an adaptor that was trained for the task."
            )
        if options.layout == "generic" and method.factors is not None:
            raise HipaError(
                f"--layout generic holds a scheduler of diffusers, and one-step method "
                f"{method.name} has [factors] in its place. Use --layout onestep."
            )
        return TaskSettings(task, method.timestep, method=method)

    # An encoder adaptor changes the VAE's own encoder, so another encoder would not carry it.
    adapts_encoder = options.adaptor is not None and (options.adaptor / ENCODER_WEIGHTS).exists()
    if options.encoder and adapts_encoder:
        raise HipaError(
            f"adaptor {options.adaptor} adapts the VAE's own encoder. "
            f"Leave out --encoder {options.encoder}."
        )

    if task == "edit":
        strengths = strength_steps(_requested_strengths(options, metadata), model)
        return TaskSettings(task, strengths[0].timestep, strengths)
    timestep = metadata.timestep if metadata else model.config.last_timestep
    if task == "upscale":
        upscale = metadata.upscale if metadata else DEFAULT_UPSCALE
        return TaskSettings(task, timestep, upscale=upscale)
    return TaskSettings(task, timestep)


def text_settings(
    options: ExportOptions,
    config: ModelConfig,
    chunk_tokens: int,
    remedy: str = "Leave out --clip-skip.",
) -> tuple[TextSettings, str | None]:
    """How the bundle encodes prompts, and a warning, or None; see ``choose_text``.

    Call ``choose_task`` first: it checks that the adaptor fits the model.

    Args:
        options: the request; what it leaves open is taken from the adaptor's metadata.
        config: of the base model.
        chunk_tokens: tokens that the text encoder reads at once, 77 for CLIP.
        remedy: as for ``choose_text``.

    Raises:
        HipaError: as ``choose_text``.

    """
    trained = None
    if options.adaptor is not None and (options.adaptor / METADATA).exists():
        trained = read_metadata(options.adaptor).text
    wishes = TextWishes(options.context_tokens, options.clip_skip, options.prompt_weights)
    return choose_text(wishes, trained, chunk_tokens, config.text_layers, remedy)


def clip_skip_warning(options: ExportOptions, config: ModelConfig) -> str | None:
    """Warn of a clip skip for SDXL's family, whose pages count as the web UIs do."""
    trained = options.adaptor is not None and (options.adaptor / METADATA).exists()
    if not options.clip_skip or not config.has_text_pair or trained:
        return None
    return (
        f"--clip-skip {options.clip_skip}: a model with two text encoders, as SDXL is, leaves out "
        "their last layer already. What the web UIs call Clip skip 2 is 0 here. If you mean that, "
        "leave out --clip-skip."
    )


def choose_method(
    options: ExportOptions, config: ModelConfig, metadata: AdaptorMetadata | None
) -> OneStepMethod | None:
    """The one-step method that ``options`` name; None is HiPA's own step.

    Args:
        options: the request.
        config: of the base model.
        metadata: of an adaptor of HiPA, which says its step itself.

    Raises:
        HipaError: there is no such method, it needs an adaptor or is not for this model, or the
            adaptor says its own step.

    """
    if options.one_step is None:
        return None
    method = load_method(options.one_step)
    if method is None:
        return None
    if metadata is not None:
        raise HipaError(
            f"adaptor {options.adaptor} says its own step (timestep {metadata.timestep}). "
            f"Leave out --one-step {options.one_step}."
        )
    check_fits(method, config)
    if method.needs_adaptor and options.adaptor is None:
        raise HipaError(
            f"one-step method {method.name} is a LoRA. Give its file with --adaptor. If it is "
            "merged into the model already, copy the preset to a .toml file with needs_adaptor = "
            "false and name that file."
        )
    return method


def step_warning(options: ExportOptions, settings: TaskSettings, model: ModelParts) -> str | None:
    """What a user should know of the step that is exported, in one line; None if nothing."""
    config = model.config
    method = settings.method
    if method is not None:
        said = method.prediction_type
        if said and said != config.prediction_type:
            return (
                f"{method.name} says that the UNet predicts {said}, and the scheduler of "
                f"{config.folder} says {config.prediction_type}: {said} is used."
            )
        return None
    if options.one_step is not None or takes_source(settings.task):
        return None
    names = ", ".join(names_for(config))
    if options.adaptor is not None and not (options.adaptor / METADATA).exists():
        return (
            f"{options.adaptor} does not say what its one step is: x0 at timestep "
            f"{settings.timestep} is used, as for HiPA. If it is another one-step LoRA, name its "
            f"method with --one-step: {names}, or a .toml file."
        )
    if options.adaptor is None and config.scheduler.get("timestep_spacing") == "trailing":
        kind = str(config.scheduler.get("_class_name"))
        if kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
            name, preset = ("SD-Turbo", "sd-turbo")
            if config.has_text_pair:
                name, preset = ("SDXL-Turbo", "sdxl-turbo")
            return (
                f"{config.folder} has a {kind} with trailing timesteps, as {name} has. If the "
                f"model is {name} or made from it, use --one-step {preset}."
            )
    return None


def asked_size(options: ExportOptions) -> tuple[int | None, int | None]:
    """Height and width of the export in pixels; None is the size that the model was made for.

    What the options leave open is the size that the adaptor was trained at.
    """
    height = options.size("height")
    width = options.size("width")
    if options.adaptor is not None and (options.adaptor / METADATA).exists():
        trained = read_metadata(options.adaptor).resolution
        height = trained[0] if height is None else height
        width = trained[1] if width is None else width
    return height, width


def size_warning(options: ExportOptions, step: OneStep) -> str | None:
    """Warn of an adaptor that was trained at another size than is exported; None if it was not."""
    if options.adaptor is None or not (options.adaptor / METADATA).exists():
        return None
    height, width = read_metadata(options.adaptor).resolution
    if (height, width) == (step.height, step.width):
        return None
    return (
        f"adaptor {options.adaptor} was trained at {width}x{height} pixels, and {step.width}x"
        f"{step.height} is exported. Images may repeat or lose things: leave out --height and "
        "--width, or train an adaptor at this size."
    )


def method_size_warning(
    options: ExportOptions, settings: TaskSettings, step: OneStep
) -> str | None:
    """Warn of another size than that of a method's model, where the user chose none."""
    size = settings.method.size if settings.method else None
    is_chosen = options.size("height") is not None or options.size("width") is not None
    if settings.method is None or size is None or is_chosen:
        return None
    if (step.height, step.width) == (size, size):
        return None
    return (
        f"{settings.method.name} makes images of {size}x{size} pixels, and the model says "
        f"{step.width}x{step.height}, which is exported. A checkpoint in one file cannot say it. "
        f"If the model is the authors' own, add --height {size} --width {size}."
    )


def print_warning(console: Console | None, text: str) -> None:
    """Print a warning as one line, however narrow the terminal is; None is the standard error."""
    console = console or Console(stderr=True)
    console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)


def _adaptor_metadata(adaptor: Path | None, model: ModelParts) -> AdaptorMetadata | None:
    """The metadata that hipa-train wrote; None without an adaptor, or for another tool's LoRA."""
    if adaptor is None:
        return None
    if not adaptor.exists():
        raise HipaError(
            f"{adaptor} does not exist. Expected an adaptor folder, as hipa-train writes it, "
            "or a LoRA's .safetensors file."
        )
    if not (adaptor / METADATA).exists():
        return None
    metadata = read_metadata(adaptor, model.folder)
    # An early check does not know the schedule, and is followed by one that does.
    if not isinstance(model.config, EarlyConfig):
        check_schedule(adaptor, metadata, model.config)
    return metadata


def _check_options(task: Task, options: ExportOptions) -> None:
    """Raise HipaError for an option that belongs to another task."""
    if task != "edit" and options.strengths:
        raise HipaError(f"--strengths is for the task edit, this is {task}. Leave out --strengths.")
    if not takes_source(task) and options.encoder:
        raise HipaError(
            f"--encoder is for tasks with a source image, this is {task}. Leave out --encoder."
        )
    if task != "generate" and options.layout == "generic":
        raise HipaError(
            f"--layout generic is for the task generate, this is {task}. Use --layout onestep."
        )


def _check_control(options: ExportOptions, trained_task: Task) -> None:
    """Raise HipaError for a ControlNet without its task, and the other way round."""
    if options.controlnet is None:
        if options.task == "control":
            raise HipaError(
                "--task control needs the network that reads control images. Give it with "
                "--controlnet."
            )
        return
    if options.task not in (None, "control"):
        raise HipaError(
            f"--controlnet is for the task control, this is {options.task}. Leave out one of the "
            "two."
        )
    if trained_task != "generate":
        raise HipaError(
            f"adaptor {options.adaptor} was trained to {trained_task}, and a ControlNet guides "
            "what was trained to generate. Leave out --controlnet, or use another adaptor."
        )


def _requested_strengths(
    options: ExportOptions, metadata: AdaptorMetadata | None
) -> tuple[float, ...]:
    """The requested strengths, all of which the adaptor must be trained for; by default all its."""
    if metadata is None:
        return options.strengths or DEFAULT_STRENGTHS
    # At another strength the adaptor would start from noise that it has never seen.
    trained = metadata.strengths
    for strength in options.strengths:
        if strength not in trained:
            known = ", ".join(map(str, trained))
            raise HipaError(
                f"adaptor {options.adaptor} was not trained for strength {strength}. "
                f"It was trained for: {known}."
            )
    if not trained:
        raise HipaError(
            f"adaptor {options.adaptor} was trained to edit, but its metadata names no strengths. "
            "Train it again."
        )
    return options.strengths or trained


def strength_steps(strengths: Sequence[float], model: ModelParts) -> tuple[Strength, ...]:
    """The constants of each strength in ``model``'s noise schedule, largest strength first.

    Raises:
        HipaError: a strength is outside (0, 1], or two of them start at the same timestep.

    """
    alpha_bars = model.config.alphas_cumprod
    # Two strengths of one timestep would be two rows of the UNet's table with the same numbers.
    by_timestep: dict[int, Strength] = {}
    for strength in sorted(strengths, reverse=True):
        if not 0 < strength <= 1:
            raise HipaError(f"strength {strength} is out of range. Expected 0 < strength <= 1.")
        timestep = strength_timestep(strength, len(alpha_bars))
        if timestep in by_timestep:
            both = f"{by_timestep[timestep].strength} and {strength}"
            raise HipaError(
                f"strengths {both} start at the same timestep, {timestep}. Leave out one of them."
            )
        by_timestep[timestep] = Strength(
            strength=strength, timestep=timestep, alpha_bar=model.config.alpha_bar(timestep)
        )
    return tuple(by_timestep.values())


def parse_strengths(text: str) -> tuple[float, ...]:
    """The strengths in the text of ``--strengths``.

    Raises:
        HipaError: the text is not numbers between commas.

    Example:
        >>> parse_strengths("0.75,0.5")
        (0.75, 0.5)

    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise HipaError(
            f"--strengths {text!r}: expected numbers in (0, 1], as in 0.75,0.5."
        ) from None
