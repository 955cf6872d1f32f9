"""Images of one step of any task, in torch: what an adaptor is measured by before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import composite, hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.tasks import STEP_INPUTS, Task, strength_timestep
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.encoder_adaptor import attach_encoder_adaptor
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import attach_adaptor

CHUNK = 32


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
) -> np.ndarray:
    """uint8 [N, H, W, 3] of the base model in one step of ``task``, or with an adaptor that was trained for it.

    ``images_NHWC`` are sources, uint8: for super-resolution the small ones; ``masks_NHW`` are 1 where to repaint.
    ``timestep`` and ``factor`` are those of inpainting and super-resolution without an adaptor: it knows its own.

    Raises:
        HipaError: an adaptor of another task, or without this strength.

    """
    model = DiffusionModel.load(model_dir, device, task)
    if adaptor_dir is not None:
        metadata = read_metadata(adaptor_dir, model_dir)
        if metadata.task != task or (task == "edit" and strength not in metadata.strengths):
            got = f"task {metadata.task}, strengths {metadata.strengths}"
            raise HipaError(
                f"adaptor {adaptor_dir} has {got}. Expected {task}, strength {strength:g}."
            )
        attach_adaptor(model.unet, adaptor_dir)
        attach_encoder_adaptor(model.vae, adaptor_dir)
        timestep, factor = metadata.timestep, metadata.upscale
    timestep = strength_timestep(strength) if task == "edit" else timestep
    sources, holes = _sources(task, images_NHWC, masks_NHW, factor)

    def chunk_images(chunk: slice) -> Tensor:
        given = _given(
            model, task, sources[chunk], None if holes is None else holes[chunk], seeds[chunk]
        )
        steps_B = torch.full((len(seeds[chunk]),), timestep, device=model.device)
        latents = task_latents(
            model.unet,
            task,
            given,
            model.context(prompts[chunk]),
            timestep_B=steps_B,
            alpha_bar=model.alpha_bar(timestep),
            prediction_type=model.prediction_type,
            concatenates=model.concatenates,
        )
        return to_uint8(model.decode(latents))

    made = torch.cat(
        [chunk_images(slice(n, n + CHUNK)) for n in range(0, len(seeds), CHUNK)]
    ).numpy()
    if holes is None:
        return made
    return np.stack(
        [composite(*parts, feather=0) for parts in zip(made, images_NHWC, holes, strict=True)]
    )


def _sources(
    task: Task, images_NHWC: np.ndarray, masks_NHW: np.ndarray | None, factor: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What the VAE's encoder sees, and the masks of inpainting."""
    if task == "upscale":
        return np.stack([enlarge(image, factor) for image in images_NHWC]), None
    if task != "inpaint":
        return images_NHWC, None
    if masks_NHW is None:
        raise HipaError("inpainting needs a mask for each image. Expected masks_NHW, [N, H, W].")
    return np.stack(
        [hide_hole(image, mask) for image, mask in zip(images_NHWC, masks_NHW, strict=True)]
    ), masks_NHW


def _given(
    model: DiffusionModel,
    task: Task,
    sources: np.ndarray,
    holes: np.ndarray | None,
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """The task's STEP_INPUTS."""
    given = {
        "noise": model.noise(seeds),
        "source": model.encode(to_float(torch.from_numpy(sources))),
    }
    if holes is not None:
        cells = np.stack([latent_mask(hole, model.pipe.vae_scale_factor) for hole in holes])
        given["mask"] = torch.from_numpy(cells).to(model.device)
    return {name: given[name] for name in STEP_INPUTS[task]}
