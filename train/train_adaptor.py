"""Train a HiPA adaptor: one readable function.

Shape suffixes: B rows of a batch, T timesteps of the noise schedule, C channels, H W height and
width (of latents, or of images where the name says image).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from hipa_deploy.models.adaptor_folder import (
    AdaptorMetadata,
    read_metadata,
    unet_sha256,
    weights_sha256,
)
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.models.style import Style
from hipa_deploy.tasks import strength_timestep
from hipa_deploy.train.data.captions import captioned_sha256
from hipa_deploy.train.data.crops import crop_corners, cropped
from hipa_deploy.train.data.edit_prompts import check_related
from hipa_deploy.train.data.examples import EDIT_NOISE_STREAM, TaskExamples, task_examples
from hipa_deploy.train.data.source_images import real_latents
from hipa_deploy.train.data.teacher_pairs import RowFunction, rows_at_once
from hipa_deploy.train.distribution.terms import distribution_terms
from hipa_deploy.train.evaluation.sample_grid import headed_grid
from hipa_deploy.train.held_out import HeldOutMeasure, held_out_examples, held_out_key
from hipa_deploy.train.loop.identity import stored_recipe
from hipa_deploy.train.loop.optimizer import new_optimizer
from hipa_deploy.train.loop.output import check_output, replacing, run_folder
from hipa_deploy.train.loop.plateau import Plateau
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.run import Run, check_extends, loss_state
from hipa_deploy.train.loop.run_lock import one_run_at_a_time
from hipa_deploy.train.loop.scalars import log_in
from hipa_deploy.train.loop.training_steps import Watch, result_lines, run_steps
from hipa_deploy.train.losses.alignment import load_alignment, scorer_identity
from hipa_deploy.train.losses.hipa_loss import Terms, hipa_loss
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.encoder_adaptor import load_encoder_weights
from hipa_deploy.train.model.mixed_precision import (
    decoder_precision,
    in_precision,
    precision_note,
    use_tensor_cores,
)
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import (
    PRESETS,
    add_adaptors,
    check_start,
    load_adaptor_weights,
    save_adaptor,
    start_note,
    without_adaptor,
)
from hipa_deploy.train.recipes.recipe import (
    Recipe,
    check_crop,
    held_out_prompts,
    read_prompts,
    source_prompts,
)
from hipa_deploy.train.training_request import check_held_out, trained_prompts, with_captions


@one_run_at_a_time
def train_adaptor(
    recipe: Recipe,
    model_dir: Path,
    out: Path,
    *,
    initial_adaptor: Path | None = None,
    style: Style | None = None,
    cache: Path | None = None,
    device: str | None = None,
    log_with: Sequence[str] = ("tensorboard",),
    console: Console | None = None,
) -> Path:
    """Train an adaptor for a Stable Diffusion model and write it to a new folder.

    The same call resumes a stopped run, and with more steps it extends a finished one: the folder
    ``out``.run holds the checkpoint, TensorBoard scalars and sample grids, whose columns are
    prompt, source image if the task has one, teacher, base model in one step, adapted model in one
    step. With held-out prompts it also holds the best step's adaptor.

    Under ``accelerate launch`` every process makes this call, and all of them train
    one adaptor (docs/how-to/several-gpus.md).

    Paths may be text.

    Args:
        recipe: The task, adaptor, teacher, loss and optimiser (docs/reference/recipe-keys.md).
        model_dir: Stable Diffusion folder, in the format of diffusers. It is not changed.
        out: The adaptor folder to write. It must not exist, be empty, or be this run's own result
            of fewer steps, which then moves to ``out``.run/finished.
        initial_adaptor: Adaptor folder to start from, with the recipe's preset, rank, alpha and
            clip skip. The LoRAs that it was trained with must be in ``style``.
        style: LoRAs and embeddings of the teacher and the student alike; the adaptor then needs the
            same LoRAs.
        cache: Folder that keeps teacher pairs between runs. Default: the user's cache.
        device: Torch device such as 'cpu' or 'cuda:1'. Default: the GPU, or the CPU without one.
        log_with: Where numbers and samples go: 'tensorboard', and names of accelerate's trackers,
            such as 'wandb'.
        console: Where to print progress. Default: stderr.

    Returns:
        ``out``, which ``pipe.load_lora_weights`` of diffusers reads.

    Raises:
        HipaError: bad input, a loss that is not finite, or Ctrl-C; the last checkpoint is kept.

    Example:
        >>> recipe = load_recipe("sd15", {"steps": 1000})
        >>> train_adaptor(recipe, Path("stable-diffusion-v1-5"), Path("adaptor"))
        PosixPath('adaptor')

    """
    # Before anything expensive: an output folder that cannot be written must fail now, and every
    # process of a launch must know which of them prints and writes.
    processes = Processes.join(recipe, device)
    console = processes.console(console)
    finished_steps = check_output(out, recipe)
    if processes.is_main:
        log_in(log_with)

    # The loss comes before the model: code of a user's own that cannot be used fails now.
    loss = hipa_loss(recipe.loss, alone=not recipe.compares_distributions)
    alignment = load_alignment(recipe.alignment)

    # Before gigabytes are loaded, and before the teacher's images.
    if initial_adaptor is not None:
        check_start(recipe, initial_adaptor, model_dir, style or Style())
        note = start_note(recipe, initial_adaptor)
        if note:
            console.print(note, highlight=False, markup=False)

    # The frozen base model. Only the networks run in the recipe's precision; x0 and the losses stay
    # in float32, because x0 enlarges an error of the UNet's output
    # (train/model/mixed_precision.py).
    model = DiffusionModel.load(
        model_dir, processes.device, recipe.task, style, recipe.text, recipe.size
    )
    use_tensor_cores(model.device)
    unet = in_precision(model.unet, recipe.mixed_precision, model.device)
    vae_precision = decoder_precision(recipe, model.config)
    decode = in_precision(model.decode, vae_precision, model.device)
    precisions = (recipe.teacher.mixed_precision, recipe.mixed_precision, vae_precision)
    slow = precision_note(precisions, model.device)
    if slow:
        console.print(slow)
    check_crop(recipe.decode_crop, model.latent_shape_CHW)
    prompts = read_prompts(recipe, model_dir)
    if recipe.task == "edit":
        check_related(with_captions(recipe, prompts), recipe.source.same)
    check_held_out(recipe, model.config)
    unseen_prompts = held_out_prompts(recipe, model_dir, trained_prompts(recipe, prompts))
    metadata = _metadata(recipe, model, prompts)
    cut = model.tokenizer.count_too_long(prompts)
    if cut:
        console.print(
            f"warning: {cut} of {len(prompts)} prompts have more tokens than a context of "
            f"{model.tokenizer.length} holds: the rest is not learned. To learn more of them, set "
            "context_tokens in the recipe's table [text]."
        )

    # The weights to train, in place in the model. The hash of the initial adaptor becomes part of
    # the run's identity, so that a checkpoint never continues from another start.
    weights = add_adaptors(model, recipe)
    if initial_adaptor is not None:
        initial = read_metadata(initial_adaptor, model_dir)
        load_adaptor_weights(model.unet, initial_adaptor)
        load_encoder_weights(model.vae, initial_adaptor)
        update = {
            "initial_sha256": weights_sha256(initial_adaptor),
            "earlier_prompts_sha256": initial.all_prompts_sha256,
        }
        metadata = metadata.model_copy(update=update)

    # Loss, optimiser and the run folder, which restores weights and optimiser of a stopped run.
    # They come before the teacher pairs so that a checkpoint of another recipe is refused at once,
    # not after hours of sampling.
    loss = loss.to(model.device)
    if alignment is not None:
        alignment = alignment.to(model.device)
    distribution = distribution_terms(model, recipe)
    optimizer = new_optimizer(weights, loss, recipe.optimiser, distribution)
    run = Run(
        folder=run_folder(out),
        weights=weights,
        optimizer=optimizer,
        identity=metadata.model_dump(mode="json") | _further_identity(recipe, model),
        recipe=recipe,
        processes=processes,
        extra_state=loss_state(loss, distribution),
        plateau=Plateau(
            recipe.held_out.patience,
            recipe.held_out.min_delta,
            held_out_key(recipe, unseen_prompts),
        ),
    )
    run.resume()
    if finished_steps:
        check_extends(out, run, read_metadata(out).model_dump(mode="json"))

    # The examples to learn from, made by the base model as teacher. For text to image the student
    # starts from the same noise as the teacher: the loss compares the two images pixel by pixel.
    with without_adaptor(model.unet, model.vae):
        examples = task_examples(
            model, recipe, prompts, cache=cache, console=console, processes=processes
        )
        if unseen_prompts:
            unseen = held_out_examples(
                model, recipe, unseen_prompts, cache=cache, console=console, processes=processes
            )
    if distribution is not None and recipe.latent_discriminator.real_images:
        folder = Path(recipe.latent_discriminator.real_images)
        distribution.real = real_latents(model, folder, console)
    alpha_bar_T = model.alphas_cumprod

    def student_latents(examples: TaskExamples, rows: Tensor) -> Tensor:
        """The student's one step, for examples ``rows`` (int64 [B]): x0 latents [B, C, H, W]."""
        timestep_B = examples.timestep(rows)
        return task_latents(
            unet,
            recipe.task,
            examples.step_inputs(rows),
            examples.conditions(rows),
            timestep_B=timestep_B,
            alpha_bar=alpha_bar_T[timestep_B].view(-1, 1, 1, 1),
            prediction_type=model.prediction_type,
            concatenates=model.concatenates,
        )

    def student_images(examples: TaskExamples, rows: Tensor) -> Tensor:
        """The student's images [B, 3, H, W], in [0, 1] but for overshoot."""
        return examples.composite(decode(student_latents(examples, rows)), rows)

    # The columns of the sample grid that stay the same: source image, target, base model. They are
    # made once, before the first step, while they still cost nothing but a forward pass.
    sample_rows = torch.arange(min(recipe.samples, examples.count))

    @torch.no_grad()
    def column(images: RowFunction) -> Tensor:
        """A column of the sample grid, uint8 [N, H, W, 3]."""
        at_once = rows_at_once(model.resolution, recipe.micro_batch or len(sample_rows))
        pieces = sample_rows.split(at_once)
        return torch.cat([to_uint8(images(rows)) for rows in pieces])

    fixed_columns = {}
    with torch.no_grad(), without_adaptor(model.unet, model.vae):
        if examples.source is not None:
            fixed_columns["source"] = examples.source(sample_rows)
        fixed_columns["teacher"] = column(examples.images)
        fixed_columns["base, one step"] = column(partial(student_images, examples))

    def decoded_part(rows: Tensor, step: int) -> Callable[[Tensor], Tensor]:
        """The part of the latents of ``rows`` that is decoded at ``step``: a square, or all."""
        side = recipe.decode_crop
        if side is None:
            return lambda latents: latents
        _, height, width = model.latent_shape_CHW
        corners = crop_corners(recipe.seed, step, rows, side, (height, width))
        return lambda latents: cropped(latents, corners, side)

    def images_of_target(latents: Tensor, rows: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] that the student's are compared with."""
        if recipe.decode_crop is None:
            return examples.images(rows)
        # In steps of 1 / 255 and in the order in memory in which whole images are kept.
        with torch.no_grad():
            image_BHWC = to_uint8(decode(part(latents))).contiguous()
        return to_float(image_BHWC).to(model.device)

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        """Mean loss over examples ``rows`` at ``step``, and its terms."""
        target_latents = examples.latents(rows) if recipe.needs_targets else None
        if target_latents is not None and step < recipe.loss.latent_warmup_steps:
            return loss.warmup_loss(student_latents(examples, rows), target_latents)

        # The target comes first: decoding it takes memory, and the student's activations stay until
        # the backward pass.
        part = decoded_part(rows, step)
        if target_latents is not None and loss.needs_images:
            target_images = images_of_target(target_latents, rows, part)
        latents = student_latents(examples, rows)

        # Decoding, forward and backward, is two thirds of a step's time: it happens only where an
        # image term needs it.
        if alignment is not None or (target_latents is not None and loss.needs_images):
            images = examples.composite(decode(part(latents)), rows)
        if target_latents is None:
            total, terms = latents.new_zeros(()), {}
        elif loss.needs_images:
            total, terms = loss(images, target_images, latents, target_latents)
        else:
            total, terms = loss.latent_loss(latents, target_latents)
        if alignment is not None:
            terms["alignment"] = alignment(images, examples.prompts(rows))
            total = total + recipe.alignment.weight * terms["alignment"]
        if distribution is None:
            return total, terms

        # What compares distributions rather than images; it has no part in the paper.
        conditions = examples.conditions(rows)
        beside, more = distribution(latents, target_latents, conditions, rows, step)
        return total + beside, terms | more

    def sample_grid(step: int) -> np.ndarray:
        """The sample grid, uint8 [height, width, 3]."""
        images = column(partial(student_images, examples))
        columns = {**fixed_columns, "HiPA, one step": images}
        return headed_grid(columns, examples.prompts(sample_rows), step)

    def save(folder: Path) -> Path:
        """Write the adaptor as it is now, with the steps and hours that it took."""
        taken = {"steps_trained": run.step, "training": run.spent.until(run.step)}
        vae = model.vae if metadata.encoder_rank else None
        record = metadata.model_copy(update=taken)
        return save_adaptor(model.unet, record, model.schedule, folder, vae)

    measure = None
    if unseen_prompts:
        measure = HeldOutMeasure(
            unseen.images,
            partial(student_images, unseen),
            unseen.count,
            model.device,
            recipe.held_out_rows,
        )
    watch = Watch(
        sample_grid,
        log_with=log_with,
        measure=measure,
        every=recipe.held_out.every,
        save_best=save,
    )
    run_steps(run, examples.count, loss_at, watch, console, distribution)

    # What is stored is the average of the weights, if the recipe keeps one and asks for it. One
    # process writes; the others wait, so that a full disk ends all of them with one message.
    with processes.fail_together(), run.written_weights():
        if processes.is_main:
            with replacing(out, finished_steps):
                save(out)
            console.print(*result_lines(out, run, finished_steps), sep="\n", highlight=False)
    return out


def _further_identity(recipe: Recipe, model: DiffusionModel) -> dict[str, Any]:
    """The part of a run's identity that its result does not record: FURTHER_IDENTITY, REPLACED."""
    shown = source_prompts(recipe, model.folder)
    source = None
    if recipe.image_folder:
        source = captioned_sha256(recipe.image_folder, recipe.source.captions)
    real = None
    if recipe.compares_distributions and recipe.latent_discriminator.real_images:
        real = captioned_sha256(Path(recipe.latent_discriminator.real_images))
    edit_noise = None
    if recipe.task == "edit" and not recipe.source_folder:
        edit_noise = EDIT_NOISE_STREAM
    return model.identity() | {
        "edit_noise": edit_noise,
        "decoding_vae_sha256": vae_sha256(model.folder),
        "source_prompts_sha256": _lines_sha256(shown) if shown else None,
        "source_images_sha256": source,
        "real_images_sha256": real,
        "scorer": scorer_identity(recipe.alignment),
    }


def _lines_sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _metadata(recipe: Recipe, model: DiffusionModel, prompts: list[str]) -> AdaptorMetadata:
    """The metadata of the adaptor folder. It is also the identity of the run's checkpoints."""
    settings = recipe.adaptor

    # An edit starts at the timestep of its strength; the strongest one stands for the adaptor.
    if recipe.task == "edit":
        strengths = recipe.source.strengths
        timestep = strength_timestep(strengths[0])
    else:
        strengths = ()
        timestep = recipe.timestep

    # The VAE is part of what was trained on only if its encoder has an adaptor: otherwise the
    # adaptor fits the model whatever its VAE.
    base_vae_sha256 = vae_sha256(model.folder) if settings.encoder_rank else None
    return AdaptorMetadata(
        task=recipe.task,
        strengths=strengths,
        upscale=recipe.source.factor,
        base_unet_sha256=unet_sha256(model.folder),
        prompts_sha256=_lines_sha256(prompts),
        encoder_rank=settings.encoder_rank,
        base_vae_sha256=base_vae_sha256,
        loras=model.style.loras,
        embeddings=model.style.embeddings,
        rank=settings.rank,
        alpha=settings.alpha or settings.rank,
        targets=PRESETS[settings.preset],
        timestep=timestep,
        prediction_type=model.prediction_type,
        alpha_bar=model.alpha_bar(timestep),
        resolution=model.resolution,
        steps_trained=recipe.steps,
        recipe=stored_recipe(recipe),
        text=recipe.text,
    )
