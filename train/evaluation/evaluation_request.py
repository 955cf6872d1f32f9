"""The request of an evaluation and its checks, which need no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hipa_deploy.bundle.text_settings import TextSettings, TextWishes, choose_text
from hipa_deploy.embedded import NAME
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.models.adaptor_folder import METADATA, read_metadata
from hipa_deploy.models.clip_tokenizer import text_sizes
from hipa_deploy.models.early_config import early_config
from hipa_deploy.models.lora.early_lora import check_adaptor, check_style
from hipa_deploy.models.style import Style
from hipa_deploy.models.weights.load_part import check_weights
from hipa_deploy.train.evaluation.contenders import Contender, check_contenders
from hipa_deploy.train.recipes.recipe import TeacherSettings, load_recipe

FIRST_SEED = 1_000_000  # training pairs have seeds above 2**32: no noise is seen twice
REFERENCE_STEPS = 25  # fewer steps would be too coarse to compare with
USUAL_RECIPE = "sd15"
REPORT_FILES = ("report.md", "report.json", "spectra.png", "premise.png", "samples.png")


@dataclass(frozen=True)
class Request:
    """A request that was checked, and what follows from it.

    Attributes:
        texts: the prompt of each image.
        text: how prompts are encoded.
        warning: what a user should know; None if nothing.

    """

    texts: list[str]
    text: TextSettings
    warning: str | None


def check_request(
    folder: Path,
    adaptor: Path | None,
    rivals: Sequence[Contender],
    style: Style,
    wishes: TextWishes,
    *,
    prompts: Path | None,
    images: int,
) -> Request:
    """Check a request before anything is loaded.

    Args:
        folder: the diffusers folder of the base model.
        adaptor: the adaptor's folder, if any.
        rivals: what else is compared.
        style: LoRAs and embeddings of the model.
        wishes: how prompts are to be encoded.
        prompts: a file of prompts; None is the model's own.
        images: how many images to compare.

    Raises:
        HipaError: something is missing, damaged, out of range or for another model.

    """
    texts, _ = draw(held_out_prompts(folder, prompts), images)
    text, warning = check_models(folder, adaptor, rivals, style, wishes)
    return Request(texts, text, warning)


def check_models(
    folder: Path,
    adaptor: Path | None,
    rivals: Sequence[Contender],
    style: Style,
    wishes: TextWishes,
) -> tuple[TextSettings, str | None]:
    """Check models and adaptors before anything is loaded; arguments as for ``check_request``.

    Returns:
        How prompts are encoded, and what a user should know of it; None if nothing.

    Raises:
        HipaError: one is missing, damaged or for another model.

    """
    check_weights(folder)
    check_style(style, folder)
    check_contenders(rivals, folder)
    trained = None
    if adaptor is not None:
        metadata = check_adaptor(adaptor, folder)
        if metadata is None:
            raise HipaError(
                f"adaptor {adaptor} has no {METADATA}. Expected a folder that hipa-train wrote, or "
                "for a LoRA of others its method: --one-step."
            )
        if metadata.task != "generate":
            raise HipaError(
                f"adaptor {adaptor} is for the task {metadata.task}. "
                "Expected one for text to image."
            )
        trained = metadata.text
    return choose_text(wishes, trained, *text_sizes(early_config(folder)))


def held_out_prompts(model_dir: Path, prompts: Path | None = None) -> list[str]:
    """The prompts to evaluate on.

    Args:
        model_dir: Diffusers folder; its prompts_pair.txt is read if ``prompts`` is None.
        prompts: A file of prompts, one a line, or a table of captions.

    Raises:
        HipaError: As ``read_prompt_file``; or ``prompts`` is None, and the model keeps none aside.

    """
    if prompts is not None:
        return read_prompt_file(prompts)
    kept_aside = model_dir / "prompts_pair.txt"
    if not kept_aside.is_file():
        raise HipaError(
            f"model {model_dir} keeps no prompts aside (it has no {kept_aside.name}). "
            "Give a file of prompts: --prompts FILE."
        )
    return read_prompt_file(kept_aside)


def draw(prompts: list[str], count: int) -> tuple[list[str], list[int]]:
    """Draw ``count`` prompts, in turn, and a noise seed for each.

    Returns:
        The prompts and the seeds, each of length ``count``.

    Raises:
        HipaError: Fewer than two different prompts, or a count outside of 4 to 100000.

    """
    different = len(set(prompts))
    if different < 2:
        raise HipaError(f"different prompts to evaluate on: {different}. Expected at least 2.")
    if not 4 <= count <= 100_000:
        raise HipaError(f"number of images: {count}. Expected 4 to 100000.")

    # In turn rather than at random: every prompt appears equally often, and there is no seed.
    texts = [prompts[number % len(prompts)] for number in range(count)]
    seeds = [FIRST_SEED + number for number in range(count)]
    return texts, seeds


@dataclass(frozen=True)
class Reference:
    """The teacher to compare with.

    Attributes:
        teacher: Its settings.
        source: Where they come from, in words.
        differs: In what it differs from the adaptor's own teacher; empty where it does not, or
            where that is not known.

    """

    teacher: TeacherSettings
    source: str
    differs: str = ""


def choose_teacher(recipe: str | None, adaptor: Path | None, model: str) -> Reference:
    """The teacher to compare with: the recipe's, or the adaptor's own, or a usual one.

    Args:
        recipe: A recipe's name or file, if one was asked for.
        adaptor: The adaptor's folder, if any; what it was trained on is in its metadata.
        model: The base model, as on the command line.

    Raises:
        HipaError: As ``load_recipe`` and ``read_metadata``.

    """
    recorded = None if adaptor is None else recorded_teacher(adaptor)
    if recipe is not None:
        teacher = load_recipe(recipe).teacher
        source = f"the recipe {recipe}"
    elif recorded is not None:
        teacher = recorded
        source = "the adaptor's own record"
    else:
        # Nobody said: the included model has its recipe, and 7.5 is usual for Stable Diffusion.
        usual = NAME if model == NAME else USUAL_RECIPE
        teacher = load_recipe(usual).teacher
        source = f"the recipe {usual}, as no adaptor says another"
    reference = reference_teacher(teacher)
    return Reference(reference, source, _differences(reference, recorded))


def recorded_teacher(adaptor: Path) -> TeacherSettings | None:
    """The teacher that an adaptor was trained on; None where its metadata does not say."""
    if not (adaptor / METADATA).exists():
        return None
    recorded = read_metadata(adaptor).recipe.get("teacher")
    try:
        return TeacherSettings.model_validate(recorded)
    except ValidationError:
        return None  # of another version, whose settings have other names


def _differences(reference: TeacherSettings, recorded: TeacherSettings | None) -> str:
    """In what the reference differs from the adaptor's own teacher, in words."""
    if recorded is None:
        return ""
    found = []
    for name in ("sampler", "steps", "guidance"):
        now = getattr(reference, name)
        then = getattr(recorded, name)
        if now != then:
            found.append(f"{name} {now} rather than {then}")
    return ", ".join(found)


def trained_on(adaptor: Path, prompts: list[str]) -> bool:
    """Whether one of an adaptor's trainings was on exactly these prompts."""
    together = "\n".join(dict.fromkeys(prompts))
    digest = hashlib.sha256(together.encode()).hexdigest()
    return digest in read_metadata(adaptor).all_prompts_sha256


def reference_teacher(teacher: TeacherSettings) -> TeacherSettings:
    """The teacher to compare with: DDIM in float32, with at least ``REFERENCE_STEPS`` steps.

    The training's own pairs may have been made faster and coarser; the reference must not change
    with them. Guidance and all other settings stay.
    """
    steps = max(REFERENCE_STEPS, teacher.steps)
    return teacher.model_copy(update={"sampler": "ddim", "steps": steps, "mixed_precision": "no"})
