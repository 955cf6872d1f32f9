"""The card of an adaptor: ``README.md`` of its repository."""

from __future__ import annotations

import math
from pathlib import Path, PureWindowsPath
from typing import Any

from hipa_deploy.disk.reading import read_json
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    WEIGHTS,
    AdaptorMetadata,
    TrainingTime,
)
from hipa_deploy.models.weights.weight_file import read_layout
from hipa_deploy.publish.base_model import BaseModel
from hipa_deploy.publish.card import (
    added_text,
    bullets,
    files_table,
    front_matter,
    licence_text,
    sections,
    table,
)
from hipa_deploy.publish.measured_quality import Report
from hipa_deploy.publish.peft_files import PEFT_WEIGHTS
from hipa_deploy.tasks import Task

TAGS = ("lora", "one-step", "hipa")
# Keys of a recipe that name a file or a folder of the one who trained.
PATHS = ("images", "prompts", "real_images", "scorer")
PROMPTED = ("generate", "edit")  # the tasks that train on prompts, with or without a folder
LAST_TIMESTEP = 999  # of Stable Diffusion's schedule, where DDIM's one step starts
EXAMPLES: dict[Task, str] = {
    "generate": 'hipa-generate my-bundle "a lighthouse" --out image.png',
    "edit": 'hipa-edit my-bundle photo.png "a snowy street" --out image.png',
    "inpaint": 'hipa-inpaint my-bundle photo.png mask.png "an empty bench" --out image.png',
    "upscale": "hipa-upscale my-bundle small.png --out large.png",
    "control": 'hipa-control my-bundle edges.png "a house by the sea" --out image.png',
}


def adaptor_card(
    folder: Path, metadata: AdaptorMetadata, repo: str, base: BaseModel, report: Report | None
) -> str:
    """The text of the card.

    Args:
        folder: the folder to publish, with every file but the card.
        metadata: of the adaptor.
        repo: owner/name of the repository.
        base: the base model.
        report: the measured quality; None says that none was measured.

    """
    head = front_matter(
        base,
        task=metadata.task,
        library="diffusers",
        tags=TAGS,
        inference={"parameters": {"num_inference_steps": 1, "guidance_scale": 0}},
    )
    about = (
        f"# {repo.split('/')[1]}\n\nA HiPA adaptor: a LoRA with which {base.name} makes an image "
        f"in one step. Without it, it takes {_teacher_steps(metadata)}. "
        f"It is for the task {metadata.task}, at timestep {metadata.timestep}. "
        "Trained with [HiPA](https://arxiv.org/abs/2311.18158) by hipa-deploy.\n\n"
    )
    parts = {
        "Use it with diffusers": _diffusers(folder, metadata, repo, base),
        "Use it with peft": _peft(folder, metadata, repo, base),
        "Use it with hipa-deploy": _hipa(metadata, repo, base),
        "What it was made from": table(_recipe(metadata, base)),
        "What it cost": table(_cost(folder, metadata)),
        "Measured quality": _quality(report),
        "Limits": bullets(_limits(metadata, base)),
        "Licence": licence_text(base, "The adaptor"),
        "Files": files_table(folder),
    }
    return head + about + sections(parts)


def _diffusers(folder: Path, metadata: AdaptorMetadata, repo: str, base: BaseModel) -> str:
    if metadata.task != "generate":
        return (
            "`pipe.load_lora_weights` loads the weights. The step of this task, with its image and "
            "mask, is none that a pipeline of diffusers takes: use hipa-deploy, below."
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    # DiffusionPipeline takes the class that the model names: SDXL has one of its own.
    lines = [
        f"from diffusers import {', '.join(sorted((scheduler, 'DiffusionPipeline')))}",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base.folder}")',
    ]
    for added in added_text(metadata.loras, metadata.embeddings):
        lines.append(f"# First add what the adaptor was trained on: {added}")
    lines += [
        f'pipe.load_lora_weights("{repo}", weight_name="{WEIGHTS}")',
        f'pipe.scheduler = {scheduler}.from_pretrained("{repo}", subfolder="scheduler")',
    ]
    # DDIM's one step starts at the last timestep by itself; others are told where.
    steps = "num_inference_steps=1"
    if metadata.timestep != LAST_TIMESTEP:
        steps = f"timesteps=[{metadata.timestep}]"
    skip = f", clip_skip={metadata.text.clip_skip}" if metadata.text.clip_skip else ""
    # An adaptor may be trained at another size than the pipeline takes by default.
    height, width = metadata.resolution
    lines += [
        "image = pipe(",
        f'    "a lighthouse", height={height}, width={width}, {steps}, guidance_scale=0{skip}',
        ").images[0]",
    ]
    return _code("python", lines)


def _peft(folder: Path, metadata: AdaptorMetadata, repo: str, base: BaseModel) -> str:
    size = (folder / PEFT_WEIGHTS).stat().st_size
    note = (
        f"\n\n`{PEFT_WEIGHTS}` ({size:,} bytes) holds the values of `{WEIGHTS}` under peft's names."
        " `unet(sample, timestep, encoder_hidden_states)` is then the adapted UNet, which takes "
        "`added_cond_kwargs` too if it is SDXL's; the step "
        f"around it is yours: x0 from timestep {metadata.timestep}, prediction type "
        f"{metadata.prediction_type}."
    )
    if metadata.encoder_rank:
        note += f" The part on the VAE's encoder, `{ENCODER_WEIGHTS}`, is not among them."
    lines = [
        "from diffusers import UNet2DConditionModel",
        "from peft import PeftModel",
        "",
        f'unet = UNet2DConditionModel.from_pretrained("{base.folder}", subfolder="unet")',
        f'unet = PeftModel.from_pretrained(unet, "{repo}")',
    ]
    return _code("python", lines) + note


def _hipa(metadata: AdaptorMetadata, repo: str, base: BaseModel) -> str:
    added = "".join(f" --lora FILE:{lora.scale:g}" for lora in metadata.loras)
    added += " --embedding FILE" * len(metadata.embeddings)
    lines = [
        "pip install 'hipa-deploy[export]'",
        f"hf download {repo} --local-dir my-adaptor",
        f"hipa-export --model {base.option} --adaptor my-adaptor{added} --out my-bundle",
        EXAMPLES[metadata.task],
    ]
    return _code("bash", lines)


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _recipe(metadata: AdaptorMetadata, base: BaseModel) -> dict[str, object]:
    recipe = metadata.recipe
    rows: dict[str, object] = {
        "base model": base.name,
        "SHA-256 of its UNet's weights": f"`{metadata.base_unet_sha256}`",
    }
    for number, added in enumerate(added_text(metadata.loras, metadata.embeddings), start=1):
        rows[f"added before the training, {number}"] = added
    rows |= _origin(metadata)
    # The recipe of an average is that of the first adaptor in it.
    of = ", of the first adaptor" if _average(metadata) else ""
    rows["task"] = metadata.task
    folder = _image_folder(metadata)
    if folder:
        rows[f"folder of images{of}"] = _name(folder)
    # Inpainting and super-resolution of a folder have its captions in place of the prompts.
    if not folder or metadata.task in PROMPTED:
        rows[f"prompts{of}"] = (
            f"{_name(recipe.get('prompts'))} (SHA-256 `{metadata.prompts_sha256}`)"
        )
    rows |= {
        "image size": f"{metadata.resolution[1]} x {metadata.resolution[0]} pixels",
        "timestep": metadata.timestep,
        "prediction type": metadata.prediction_type,
        "rank, alpha": f"{metadata.rank}, {metadata.alpha:g}",
        "adapted layers": ", ".join(metadata.targets),
    }
    if metadata.strengths:
        rows["strengths"] = ", ".join(f"{strength:g}" for strength in metadata.strengths)
    tables = ["teacher", "loss", "optimiser", "score", "latent_discriminator", "alignment"]
    if metadata.task != "generate" or folder:
        tables.insert(0, "source")
    for name in tables:
        values = recipe.get(name)
        if isinstance(values, dict):
            rows[f"recipe [{name}]{of}"] = _flat(values)
    return rows


def _origin(metadata: AdaptorMetadata) -> dict[str, object]:
    """What the adaptor was made of, where it was not trained from scratch."""
    average = _average(metadata)
    if average:
        hashes = ", ".join(f"`{each}`" for each in average["adaptors"])
        return {
            "average of": f"{len(average['adaptors'])} adaptors, SHA-256 of their weights {hashes}",
            "left out by its rank": f"{average['left_out']:.1%} of the average's norm",
        }
    if metadata.initial_sha256 is None:
        return {}
    count = len(metadata.earlier_prompts_sha256)
    sets = "1 set of prompts" if count == 1 else f"{count} sets of prompts"
    if not count:  # the first adaptors that started from another did not record its prompts
        sets = "prompts that were not recorded"
    start = f"an adaptor, SHA-256 of its weights `{metadata.initial_sha256}`"
    return {"started from": f"{start}, trained before on {sets}"}


def _average(metadata: AdaptorMetadata) -> dict[str, Any] | None:
    """What ``hipa-train --average`` recorded; None for an adaptor that was trained."""
    average = metadata.recipe.get("average")
    # A program that wrote the file anew may have made 0 of 0.0.
    if not isinstance(average, dict) or not isinstance(average.get("left_out"), int | float):
        return None
    return average if isinstance(average.get("adaptors"), list) else None


def _image_folder(metadata: AdaptorMetadata) -> str | None:
    """The folder of images that was trained on."""
    source = metadata.recipe.get("source")
    return source.get("images") if isinstance(source, dict) else None


def _flat(values: dict[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        if value is not None:
            parts.append(f"{name} = {_name(value) if name in PATHS else value}")
    return ", ".join(parts)


def _name(path: object) -> str:
    """A path's last part: the folders before it are nobody's business."""
    # Of Windows, since it takes both kinds of slashes.
    return PureWindowsPath(str(path)).name or "."


def _cost(folder: Path, metadata: AdaptorMetadata) -> dict[str, object]:
    recipe = metadata.recipe
    averaged = _average(metadata) is not None
    weights = "weights" if averaged else "trained weights"
    rows: dict[str, object] = {
        weights: f"{_weights(folder / WEIGHTS):,}",
        "size of the adaptor": f"{(folder / WEIGHTS).stat().st_size:,} bytes",
    }
    if metadata.encoder_rank:
        count = _weights(folder / ENCODER_WEIGHTS)
        rows[f"{weights} of the VAE's encoder"] = f"{count:,}"
    # Steps and images of an average are those of its adaptors, whose recipes may be different ones.
    if not averaged:
        alone = ", of this training alone" if metadata.initial_sha256 else ""
        rows["optimiser steps"] = f"{metadata.steps_trained:,}{alone}"
        batch = recipe.get("batch")
        if isinstance(batch, int):
            rows["images seen"] = f"{metadata.steps_trained * batch:,} ({batch} a step){alone}"
        if "mixed_precision" in recipe:
            rows["mixed precision"] = recipe["mixed_precision"]
        rows |= _teacher_cost(metadata)
    rows["an image now"] = "1 UNet evaluation"
    hours = "; ".join(map(_time, metadata.training)) or "not recorded"
    if metadata.training and averaged:
        hours += ", of all its adaptors together"
    if metadata.training and metadata.initial_sha256:
        hours += ", of this training alone"
    rows["hours and device"] = hours
    return rows


def _teacher_cost(metadata: AdaptorMetadata) -> dict[str, object]:
    """What the teacher made for the training."""
    teacher = metadata.recipe.get("teacher")
    if not isinstance(teacher, dict):
        return {}
    numbers = [teacher.get(key) for key in ("pairs", "steps", "guidance")]
    if not all(isinstance(number, int | float) for number in numbers):
        return {}
    # Guidance needs the UNet twice a step, with and without the prompt.
    calls = teacher["steps"] * (2 if teacher["guidance"] > 1 else 1)
    pairs = teacher["pairs"]
    if metadata.task == "generate" and not _needs_targets(metadata.recipe):
        # They are made for the sample grid alone.
        pairs = min(pairs, metadata.recipe.get("samples") or pairs)
    rows: dict[str, object] = {}
    folder = _image_folder(metadata)
    if not folder or metadata.task == "generate":
        rows["teacher's images"] = f"{pairs:,}, {calls} UNet evaluations each"
    if metadata.task == "edit" or (metadata.task == "generate" and folder):
        source = metadata.recipe.get("source")
        each = (source.get("per_image") if isinstance(source, dict) else None) or 1
        # How many images a folder had is not recorded.
        count = f"{each:,} of each image" if folder else f"{pairs * each:,}"
        rows["teacher's edits"] = f"{count}, at most {calls} UNet evaluations each"
    return rows


def _needs_targets(recipe: dict[str, Any]) -> bool:
    """Whether the loss looks at the teacher's images; a score alone does not.

    A setting that an older recipe lacks counts as one that does.
    """

    def weight(table: str, name: str, default: float = 0.0) -> float:
        values = recipe.get(table)
        value = values.get(name) if isinstance(values, dict) else None
        return default if value is None else value

    if not weight("score", "weight"):
        return True
    if weight("latent_discriminator", "weight") or weight("loss", "latent_warmup_steps"):
        return True
    has_distance = weight("loss", "perceptual", 1.0) != "none"
    high_frequency = weight("loss", "fourier_weight", 1.0) + weight("loss", "edge_weight", 1.0)
    terms = (
        weight("loss", "latent_weight", 1.0),
        weight("loss", "latent_hf_weight"),
        has_distance and weight("loss", "perceptual_weight", 1.0),
        weight("loss", "hf_weight", 1.0) * high_frequency,
        weight("loss", "amplitude_weight"),
        weight("loss", "pixel_weight"),
        weight("loss", "custom") and weight("loss", "custom_weight", 1.0),
    )
    return any(terms)


def _time(spent: TrainingTime) -> str:
    count = "" if spent.processes == 1 else f"{spent.processes} x "
    hours = f"{spent.hours:.1f} h" if spent.hours >= 0.1 else f"{60 * spent.hours:.1f} min"
    return f"{hours} on {count}{spent.card} ({spent.device}), {spent.steps:,} steps"


def _weights(path: Path) -> int:
    return sum(math.prod(entry.shape) for entry in read_layout(path).values())


def _teacher_steps(metadata: AdaptorMetadata) -> str:
    teacher = metadata.recipe.get("teacher")
    steps = teacher.get("steps") if isinstance(teacher, dict) else None
    return f"{steps} steps" if steps else "many steps"


def _quality(report: Report | None) -> str:
    return report.text if report else "None was measured for this card."


def _limits(metadata: AdaptorMetadata, base: BaseModel) -> list[str]:
    height, width = metadata.resolution
    tokens = metadata.text.context_tokens or 77
    found = [
        f"It fits one model: {base.name}, with the UNet whose hash is above. On another one, or on "
        "a fine-tune of it, it loads and gives bad images. hipa-deploy refuses that.",
        "One step, always: it was trained for no more. There is no guidance and no negative "
        "prompt.",
        f"It was trained at {width} x {height} pixels. Other sizes were not measured.",
        f"A prompt is read up to {tokens} tokens.",
        "It shows what its base model shows, and has that model's biases.",
    ]
    if metadata.text.clip_skip:
        found.append(f"Prompts are encoded with clip skip {metadata.text.clip_skip} (diffusers).")
    if metadata.text.context_tokens and metadata.text.context_tokens > 77:
        found.append("diffusers' own pipeline cuts a prompt at 77 tokens.")
    if metadata.loras or metadata.embeddings:
        found.append("Without the LoRAs and embeddings that are named above its images are wrong.")
    return found
