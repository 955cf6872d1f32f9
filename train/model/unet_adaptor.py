"""The low-rank adaptor: which layers it touches, and a folder that ``pipe.load_lora_weights`` takes as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.files import new_folder
from hipa_deploy.models.adaptor_folder import METADATA, WEIGHTS, AdaptorMetadata, read_metadata
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.encoder_adaptor import (
    ADAPTER,
    add_encoder_adaptor,
    save_encoder_adaptor,
)
from hipa_deploy.train.model.one_step import one_step_latents
from hipa_deploy.train.recipes.recipe import Recipe

# The paper's 3.3 M trainable parameters fit one set only: SD 2.x, rank 16, all four attention projections.
PAPER = ("to_q", "to_k", "to_v", "to_out.0")
# The layers of LCM-LoRA, less time_emb_proj: at a single timestep that one is a constant.
FULL = (*PAPER, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
        "downsamplers.0.conv", "upsamplers.0.conv")  # fmt: skip
PRESETS = {"paper": PAPER, "full": FULL}


def add_adaptors(model: DiffusionModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Add the recipe's trainable layers to the frozen ``model``, in place; their parameters by name.

    Those of the UNet have their names in it, those of the VAE's encoder 'vae.' and theirs. Activations are recomputed
    in the backward pass if the recipe says so.

    Raises:
        HipaError: a target of the preset matches no layer.

    """
    settings = recipe.adaptor
    alpha = settings.alpha or settings.rank
    add_adaptor(
        model.unet,
        targets=PRESETS[settings.preset],
        rank=settings.rank,
        alpha=alpha,
        seed=recipe.seed,
    )
    if settings.encoder_rank:
        add_encoder_adaptor(model.vae, settings.encoder_rank, recipe.seed)
    if recipe.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.vae.enable_gradient_checkpointing()
    return trained_parameters(model)


def add_adaptor(
    unet: nn.Module, *, targets: tuple[str, ...], rank: int, alpha: float, seed: int
) -> None:
    """Freeze ``unet`` and add trainable low-rank layers (B = 0, so the function does not change yet).

    Raises:
        HipaError: a target matches no layer.

    """
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise HipaError(
                f"adaptor target {target!r} matches no layer of the UNet. Remove it from the targets."
            )
    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets)), ADAPTER
        )


@contextmanager
def without_adaptor(*models: Any) -> Iterator[None]:
    """The base models' functions inside the block; adaptors, where there are any, are trainable again after it."""
    adapted = [model for model in models if getattr(model, "peft_config", None)]
    for model in adapted:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in adapted:
            model.enable_adapters()


def trained_parameters(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """Those of the UNet by their names in it, and those of the VAE by 'vae.' and theirs."""
    encoder = {f"vae.{name}": weight for name, weight in adaptor_parameters(model.vae).items()}
    return adaptor_parameters(model.unet) | encoder


def adaptor_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the order of the modules."""
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def one_step_scheduler(schedule: dict[str, Any], timestep: int) -> DDIMScheduler | LCMScheduler:
    """A scheduler whose single step is exactly the x0 formula at ``timestep``."""
    if timestep == schedule.get("num_train_timesteps", 1000) - 1:
        exact = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        return DDIMScheduler(**schedule, **exact)
    return LCMScheduler(**schedule)  # the pipeline call must then say timesteps=[timestep]


def save_adaptor(
    unet: nn.Module, metadata: AdaptorMetadata, schedule: dict[str, Any], out: Path, vae: Any = None
) -> Path:
    """Write weights, one-step scheduler and metadata to the new folder ``out``, whole or not at all.

    With ``vae``, its encoder's part too.

    The LoRA configuration goes into the safetensors header: without it a loader assumes alpha = rank. Names stay
    peft's: diffusers' own conversion renames the attention layers only, and its loader then skips them in silence.
    """
    weights = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise HipaError(f"adaptor weight {name} is not finite. Nothing was written to {out}.")
    config = unet.peft_config[ADAPTER].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    with new_folder(out) as scratch:
        StableDiffusionPipeline.save_lora_weights(
            scratch,
            unet_lora_layers={name: weight.cpu().contiguous() for name, weight in weights.items()},
            unet_lora_adapter_metadata=config,
        )
        (scratch / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        if vae is not None:
            save_encoder_adaptor(vae, scratch)
        one_step_scheduler(schedule, metadata.timestep).save_pretrained(scratch / "scheduler")
        (scratch / METADATA).write_text(metadata.model_dump_json(indent=2) + "\n")
    return out


def attach_adaptor(unet: Any, folder: Path) -> None:
    """Add a trained adaptor for inference: ``pipe.load_lora_weights`` without its warning that there is no text part.

    Raises:
        HipaError: the file is damaged or does not fit.

    """
    try:
        unet.load_lora_adapter(
            str(folder), prefix="unet", weight_name=WEIGHTS, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise HipaError(f"adaptor {folder} cannot be loaded: {first_line(error)}") from None


def one_step_model(
    model: DiffusionModel, timestep: int, adaptor: Path | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """(noise [B, C, H, W], context [B, L, D]) -> x0 latents [B, C, H, W] float32, in one UNet call.

    Of the base model at ``timestep``, or with ``adaptor`` added to it in place, at the timestep it was trained for.

    Raises:
        HipaError: the adaptor is damaged, for another task, or was trained on another base model.

    """
    if adaptor is not None:
        metadata = read_metadata(adaptor, model.folder)
        if metadata.task != "generate":
            raise HipaError(
                f"adaptor {adaptor} is for the task {metadata.task}. Expected one for text to image."
            )
        timestep = metadata.timestep
        attach_adaptor(model.unet, adaptor)
    return partial(
        one_step_latents,
        model.unet,
        timestep=timestep,
        alpha_bar=model.alpha_bar(timestep),
        prediction_type=model.prediction_type,
    )


def load_weights(unet: nn.Module, folder: Path) -> None:
    """Copy an adaptor's weights into the layers that ``add_adaptor`` made.

    Raises:
        HipaError: the file is damaged, or its layers, rank or alpha are others.

    """
    alpha = read_metadata(folder).alpha
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise HipaError(f"adaptor {folder / WEIGHTS} cannot be read: {error}") from None
    weights = {name.removeprefix("unet."): weight for name, weight in stored.items()}
    expected = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    same_shapes = {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in expected.items()
    }
    if not same_shapes or alpha != unet.peft_config[ADAPTER].lora_alpha:
        raise HipaError(
            f"adaptor {folder} has another preset, rank or alpha than the recipe. See its {METADATA}."
        )
    set_peft_model_state_dict(unet, weights, adapter_name=ADAPTER)
