"""Which task is exported, and where its step starts: what the adaptor was trained for, or what is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.bundle.manifest import Strength
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import BaseModel
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    METADATA,
    AdaptorMetadata,
    read_metadata,
)
from hipa_deploy.tasks import Task, strength_timestep, unet_inputs

LAST_TIMESTEP = 999
DEFAULT_STRENGTHS = (0.5,)
DEFAULT_UPSCALE = 4


@dataclass(frozen=True)
class TaskPlan:
    """The task, the timestep of its step (of an edit's largest strength), and what belongs to some tasks alone."""

    task: Task = "generate"
    timestep: int = LAST_TIMESTEP
    strengths: tuple[Strength, ...] = ()
    upscale: int | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the UNet's inputs."""
        return unet_inputs(self.task, len(self.strengths))


def plan_task(asked: ExportOptions, base: BaseModel) -> TaskPlan:
    """The plan for ``asked``.

    Raises:
        HipaError: no such adaptor, one for another base model, task or strength, a strength that is no share of the
            noise or is there twice, or an option that the task does not take.

    """
    metadata = _metadata(asked.adaptor, base)
    task = asked.task or (metadata.task if metadata else "generate")
    if metadata and metadata.task != task:
        raise HipaError(
            f"adaptor {asked.adaptor} was trained to {metadata.task}, not to {task}. "
            f"Use an adaptor for {task}, or leave --task out."
        )
    _check_options(task, asked)
    if asked.encoder and asked.adaptor and (asked.adaptor / ENCODER_WEIGHTS).exists():
        raise HipaError(
            f"adaptor {asked.adaptor} adapts the VAE's own encoder. Leave --encoder {asked.encoder} out."
        )
    if task == "edit":
        strengths = strength_steps(_asked_strengths(asked, metadata), base)
        return TaskPlan(task, strengths[0].timestep, strengths)
    upscale = (metadata.upscale if metadata else DEFAULT_UPSCALE) if task == "upscale" else None
    return TaskPlan(task, metadata.timestep if metadata else LAST_TIMESTEP, upscale=upscale)


def _metadata(adaptor: Path | None, base: BaseModel) -> AdaptorMetadata | None:
    """What the adaptor says of itself; another tool's LoRA says nothing."""
    if adaptor is None:
        return None
    if not adaptor.is_dir():
        raise HipaError(
            f"{adaptor} does not exist. Expected an adaptor folder, as hipa-train writes it."
        )
    return read_metadata(adaptor, base.folder) if (adaptor / METADATA).exists() else None


def _check_options(task: Task, asked: ExportOptions) -> None:
    if task != "edit" and asked.strengths:
        raise HipaError(f"--strengths is for the task edit, this is {task}. Leave it out.")
    if task == "generate" and asked.encoder:
        raise HipaError(
            "--encoder is for tasks with a source image, this is generate. Leave it out."
        )
    if task != "generate" and asked.layout == "generic":
        raise HipaError(
            f"--layout generic is for the task generate, this is {task}. Use --layout onestep."
        )


def _asked_strengths(asked: ExportOptions, metadata: AdaptorMetadata | None) -> tuple[float, ...]:
    """Those that were asked for, of those that the adaptor was trained for; or all of these."""
    if metadata is None:
        return asked.strengths or DEFAULT_STRENGTHS
    trained = metadata.strengths
    if foreign := [strength for strength in asked.strengths if strength not in trained]:
        have = ", ".join(map(str, trained))
        raise HipaError(
            f"adaptor {asked.adaptor} was not trained for strength {foreign[0]}. It has: {have}."
        )
    if not trained:
        raise HipaError(
            f"adaptor {asked.adaptor} was trained to edit, but names no strengths. Train it again."
        )
    return asked.strengths or trained


def strength_steps(strengths: Sequence[float], base: BaseModel) -> tuple[Strength, ...]:
    """The constants of each strength, largest first.

    Raises:
        HipaError: one outside (0, 1], or two that start at the same timestep.

    """
    schedule = base.scheduler()
    found: dict[int, Strength] = {}
    for strength in sorted(strengths, reverse=True):
        if not 0 < strength <= 1:
            raise HipaError(f"strength {strength} is out of range. Expected 0 < strength <= 1.")
        timestep = strength_timestep(strength, len(schedule.alphas_cumprod))
        if timestep in found:
            twice = f"{found[timestep].strength} and {strength}"
            raise HipaError(
                f"strengths {twice} start at the same timestep, {timestep}. Leave one out."
            )
        alpha_bar = float(schedule.alphas_cumprod[timestep])
        found[timestep] = Strength(strength=strength, timestep=timestep, alpha_bar=alpha_bar)
    return tuple(found.values())


def parse_strengths(text: str) -> tuple[float, ...]:
    """'0.75,0.5' -> (0.75, 0.5).

    Raises:
        HipaError: not numbers between commas.

    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise HipaError(
            f"--strengths {text!r}: expected numbers in (0, 1], as in 0.75,0.5."
        ) from None
