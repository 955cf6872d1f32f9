"""Train a HiPA adaptor: one readable function."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hipa_deploy.files import refuse_to_overwrite
from hipa_deploy.models.adaptor_folder import (
    AdaptorMetadata,
    read_metadata,
    unet_sha256,
    weights_sha256,
)
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.tasks import strength_timestep
from hipa_deploy.train.data.examples import task_examples
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.run import Run, loss_state, new_optimizer, run_steps
from hipa_deploy.train.losses.hipa_loss import Terms, hipa_loss
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_uint8
from hipa_deploy.train.model.encoder_adaptor import load_encoder_weights
from hipa_deploy.train.model.mixed_precision import in_precision
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import (
    PRESETS,
    add_adaptors,
    load_weights,
    save_adaptor,
    without_adaptor,
)
from hipa_deploy.train.recipes.recipe import Recipe, read_prompts


def train_adaptor(
    recipe: Recipe,
    model_dir: Path,
    out: Path,
    *,
    initial_adaptor: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train an adaptor for ``model_dir`` and write it to the new folder ``out``; the same call resumes a stopped run.

    Under ``accelerate launch`` every process makes this call, and all train one adaptor (docs/distributed.md).
    ``out``.run holds the checkpoint, TensorBoard scalars and sample grids (teacher | base in one step | adapted).
    ``initial_adaptor`` is an adaptor folder of the same shape to start from. ``cache`` keeps teacher pairs.

    Raises:
        HipaError: bad input, a loss that is not finite, or Ctrl-C; the last checkpoint stays.

    """
    processes = Processes.join(recipe, device)
    console = processes.console(console)
    refuse_to_overwrite(out)

    # The frozen base model, and what it says about the one step.
    model = DiffusionModel.load(model_dir, processes.device, recipe.task)
    unet, decode = (
        in_precision(part, recipe.mixed_precision, model.device)
        for part in (model.unet, model.decode)
    )
    prompts = read_prompts(recipe, model_dir)
    metadata = _metadata(recipe, model, prompts)

    # Adaptor, loss, optimiser; the run folder puts them back to where a stopped run was. All of it comes before the
    # teacher pairs, so that whatever does not fit shows before anything expensive starts.
    weights = add_adaptors(model, recipe)
    if initial_adaptor is not None:
        read_metadata(initial_adaptor, model_dir)
        load_weights(model.unet, initial_adaptor)
        load_encoder_weights(model.vae, initial_adaptor)
        metadata = metadata.model_copy(update={"initial_sha256": weights_sha256(initial_adaptor)})
    loss = hipa_loss(recipe.loss).to(model.device)
    optimizer = new_optimizer(weights, loss, recipe.optimiser)
    identity, kept = metadata.model_dump(mode="json"), loss_state(loss, recipe, processes)
    run = Run(
        out.with_name(out.name + ".run"), weights, optimizer, identity, recipe, processes, kept=kept
    )
    run.resume()

    # What to learn from: for text to image the same noise leads to the student's image and to the teacher's.
    with without_adaptor(model.unet, model.vae):
        examples = task_examples(
            model, recipe, prompts, cache=cache, console=console, processes=processes
        )
    alpha_bar_T = model.alphas_cumprod

    def student_latents(rows: Tensor) -> Tensor:
        timestep_B = examples.timestep(rows)
        return task_latents(
            unet,
            recipe.task,
            examples.step_inputs(rows),
            examples.context(rows),
            timestep_B=timestep_B,
            alpha_bar=alpha_bar_T[timestep_B].view(-1, 1, 1, 1),
            prediction_type=model.prediction_type,
            concatenates=model.concatenates,
        )

    def student_images(rows: Tensor) -> Tensor:
        return examples.composite(decode(student_latents(rows)), rows)

    # The columns of the sample grid that stay: source, if there is one; target; the base model.
    shown = torch.arange(min(recipe.samples, examples.count))
    with torch.no_grad(), without_adaptor(model.unet, model.vae):
        columns = [examples.source(shown)] if examples.source else []
        columns += [to_uint8(examples.images(shown)), to_uint8(student_images(shown))]

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        # One UNet call, x0 in float32, decoded unless in the warm-up.
        latents, target_latents = student_latents(rows), examples.latents(rows)
        if step < recipe.loss.latent_warmup_steps:
            return loss.latent_only(latents, target_latents)
        if not loss.decodes:
            return loss.of_latents(latents, target_latents)
        return loss(
            examples.composite(decode(latents), rows),
            examples.images(rows),
            latents,
            target_latents,
        )

    @torch.no_grad()
    def samples() -> list[Tensor]:
        return [*columns, to_uint8(student_images(shown))]

    run_steps(run, examples.count, loss_at, samples, console)
    with processes.together(), run.average.applied():
        if processes.is_main:
            vae = model.vae if metadata.encoder_rank else None
            save_adaptor(model.unet, metadata, model.schedule, out, vae)
    return out


def _metadata(recipe: Recipe, model: DiffusionModel, prompts: list[str]) -> AdaptorMetadata:
    settings, edit = recipe.adaptor, recipe.task == "edit"
    timestep = strength_timestep(recipe.source.strengths[0]) if edit else recipe.timestep
    return AdaptorMetadata(
        task=recipe.task,
        strengths=recipe.source.strengths if edit else (),
        upscale=recipe.source.factor,
        base_unet_sha256=unet_sha256(model.folder),
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        encoder_rank=settings.encoder_rank,
        base_vae_sha256=vae_sha256(model.folder) if settings.encoder_rank else None,
        rank=settings.rank,
        alpha=settings.alpha or settings.rank,
        targets=PRESETS[settings.preset],
        timestep=timestep,
        prediction_type=model.prediction_type,
        alpha_bar=model.alpha_bar(timestep),
        resolution=model.resolution,
        steps_trained=recipe.steps,
        recipe=_without_folders(recipe),
    )


def _without_folders(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the adaptor keeps it: files by name, not by where they lay."""
    values: dict[str, Any] = recipe.model_dump()
    for table, key in (
        (values, "prompts"),
        (values["source"], "prompts"),
        (values["source"], "images"),
    ):
        table[key] = table[key] and Path(table[key]).name
    return values
