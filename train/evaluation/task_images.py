"""One-step images of any task, in torch: they judge an adaptor before anything is exported.

Shapes: N images, B images of a chunk, H, W size of the source images in pixels, H', W' the model's
own size (which is H, W except for super-resolution), C latent channels, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import composite, hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.models.adaptor_folder import check_schedule, read_metadata
from hipa_deploy.models.style import Style, check_same_loras
from hipa_deploy.tasks import STEP_INPUTS, Task, strength_timestep
from hipa_deploy.train.data.teacher_pairs import rows_at_once
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.encoder_adaptor import attach_encoder_adaptor
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import attach_adaptor

CHUNK = 32  # images that go through the model at once


@torch.no_grad()
def one_step_task_images(
    model_dir: Path,
    adaptor_dir: Path | None,
    task: Task,
    images_NHWC: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    masks_NHW: np.ndarray | None = None,
    strength: float = 0.8,
    timestep: int = 999,
    factor: int = 4,
    device: str | None = None,
    style: Style | None = None,
) -> np.ndarray:
    """Images of the base model in one step of a task, or of the base model with an adaptor.

    Args:
        model_dir: Diffusers folder of the base model.
        adaptor_dir: Folder of an adaptor that was trained for ``task``; None is the base model.
        task: 'edit', 'inpaint' or 'upscale'.
        images_NHWC: Source images uint8; for super-resolution the small ones.
        prompts: N prompts.
        seeds: The noise seed of each image.
        masks_NHW: For inpainting, 1 where to repaint and 0 elsewhere.
        strength: Of edits, in (0, 1].
        timestep: Of inpainting and super-resolution without an adaptor; an adaptor has its own.
        factor: Of super-resolution without an adaptor; an adaptor has its own.
        device: 'cpu', 'cuda', ...; None is the GPU if there is one.
        style: LoRAs and embeddings that are added to the model before the adaptor.

    Returns:
        uint8 [N, H', W', 3].

    Raises:
        HipaError: An adaptor of another task or without this strength, a mask that is missing or
            empty, or a model or adaptor that cannot be loaded.

    Example:
        >>> images = np.zeros((2, 64, 64, 3), np.uint8)
        >>> texts = ["a red apple", "a boat"]
        >>> edited = one_step_task_images(model, adaptor, "edit", images, texts, [0, 1])
        >>> edited.shape
        (2, 64, 64, 3)

    """
    # The model, and the settings of the step: an adaptor knows those that it was trained for.
    text = None
    size = None
    if adaptor_dir is not None:
        trained = read_metadata(adaptor_dir)
        text = trained.text
        size = trained.resolution
    model = DiffusionModel.load(model_dir, device, task, style, text, size)
    if adaptor_dir is not None:
        metadata = read_metadata(adaptor_dir, model_dir)
        check_schedule(adaptor_dir, metadata, model.config)
        check_same_loras(adaptor_dir, metadata.loras, model.style.loras)
        if metadata.task != task or (task == "edit" and strength not in metadata.strengths):
            raise HipaError(
                f"adaptor {adaptor_dir} has task {metadata.task}, strengths {metadata.strengths}. "
                f"Expected {task}, strength {strength:g}."
            )
        attach_adaptor(model.unet, adaptor_dir)
        attach_encoder_adaptor(model.vae, adaptor_dir)
        timestep = metadata.timestep
        factor = metadata.upscale
    if task == "edit":
        timestep = strength_timestep(strength)
    sources, holes = _prepare_sources(task, images_NHWC, masks_NHW, factor)

    # The step itself, by chunks.
    chunks = []
    at_once = rows_at_once(model.resolution, CHUNK)
    for start in range(0, len(seeds), at_once):
        chunk = slice(start, start + at_once)
        chunk_holes = None if holes is None else holes[chunk]
        step_inputs = _step_inputs(model, task, sources[chunk], chunk_holes, seeds[chunk])
        latents = task_latents(
            model.unet,
            task,
            step_inputs,
            model.conditions(prompts[chunk]),
            timestep_B=torch.full((len(seeds[chunk]),), timestep, device=model.device),
            alpha_bar=model.alpha_bar(timestep),
            prediction_type=model.prediction_type,
            concatenates=model.concatenates,
        )
        chunks.append(to_uint8(model.decode(latents)))
    made = torch.cat(chunks).numpy()
    if holes is None:
        return made

    # Decoding changes every pixel a little; outside of the hole the source's own pixels stay.
    finished = []
    for image, source, hole in zip(made, images_NHWC, holes, strict=True):
        finished.append(composite(image, source, hole, feather=0, match=True))
    return np.stack(finished)


def _prepare_sources(
    task: Task, images_NHWC: np.ndarray, masks_NHW: np.ndarray | None, factor: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What the VAE's encoder sees, uint8 [N, H', W', 3], and the masks of inpainting."""
    if task == "upscale":
        return np.stack([enlarge(image, factor) for image in images_NHWC]), None
    if task != "inpaint":
        return images_NHWC, None
    if masks_NHW is None:
        raise HipaError("inpainting needs a mask for each image. Expected masks_NHW, [N, H, W].")
    # The encoder must not see what lies in the hole, as in training.
    pairs = zip(images_NHWC, masks_NHW, strict=True)
    return np.stack([hide_hole(image, mask) for image, mask in pairs]), masks_NHW


def _step_inputs(
    model: DiffusionModel,
    task: Task,
    sources: np.ndarray,
    holes: np.ndarray | None,
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """The tensors of the task's ``STEP_INPUTS``, by name."""
    tensors = {
        "noise": model.noise(seeds),
        "source": model.encode(to_float(torch.from_numpy(sources))),
    }
    if holes is not None:
        cells = np.stack([latent_mask(hole, model.pipe.vae_scale_factor) for hole in holes])
        tensors["mask"] = torch.from_numpy(cells).to(model.device)
    return {name: tensors[name] for name in STEP_INPUTS[task]}
