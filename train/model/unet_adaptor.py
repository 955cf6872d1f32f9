"""The low-rank adaptor: which layers it has, and the folder it is stored in.

diffusers reads that folder with ``pipe.load_lora_weights``.

Shape suffixes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from hipa_deploy.disk.files import new_folder
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import (
    METADATA,
    WEIGHTS,
    AdaptorMetadata,
    check_schedule,
    read_metadata,
)
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.own_step import one_step_scheduler
from hipa_deploy.models.style import Style, check_same_loras
from hipa_deploy.models.weights.weight_file import load_tensors
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.encoder_adaptor import (
    ADAPTER,
    add_encoder_adaptor,
    attach_lora,
    check_storable,
    finish_file,
    same_shapes,
    save_encoder_adaptor,
)
from hipa_deploy.train.model.one_step import one_step_latents
from hipa_deploy.train.recipes.recipe import Recipe

# The four attention projections: at rank 16 on SD 2.x they have the paper's 3.3 M trainable
# parameters (docs/explanation/hipa.md).
PAPER = ("to_q", "to_k", "to_v", "to_out.0")
# The layers of LCM-LoRA without time_emb_proj: at a single timestep its output is a constant.
FULL = (
    *PAPER,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
PRESETS = {"paper": PAPER, "full": FULL}


def add_adaptors(model: DiffusionModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Add the recipe's trainable layers to the frozen ``model``, in place.

    With the recipe's ``gradient_checkpointing``, activations are recomputed in the backward pass.

    Returns:
        ``trained_parameters(model)``.

    Raises:
        HipaError: a target of the preset matches no layer.

    """
    settings = recipe.adaptor
    add_adaptor(
        model.unet,
        targets=PRESETS[settings.preset],
        rank=settings.rank,
        alpha=settings.alpha or settings.rank,
        seed=recipe.seed,
    )
    if settings.encoder_rank:
        add_encoder_adaptor(model.vae, settings.encoder_rank, recipe.seed)
    if recipe.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.vae.enable_gradient_checkpointing()
    return trained_parameters(model)


def add_adaptor(unet: Any, *, targets: tuple[str, ...], rank: int, alpha: float, seed: int) -> None:
    """Freeze a UNet2DConditionModel and add trainable low-rank layers to it, in place.

    Their B matrices are zero, so that the UNet's function does not change yet. ``seed`` alone
    decides their A matrices.

    Args:
        unet: The UNet2DConditionModel.
        targets: The layers to adapt: names, or the ends of names after a dot.
        rank: Rank of every pair of matrices.
        alpha: The layers' output is multiplied by alpha / rank.
        seed: Of the A matrices.

    Raises:
        HipaError: a target matches no layer.

    """
    # peft raises only if no target at all matches: a misspelt one among others would go unnoticed.
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise HipaError(
                f"adaptor target {target!r} matches no layer of the UNet. "
                "Remove it from the targets."
            )

    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(config, ADAPTER)


@contextmanager
def without_adaptor(*models: Any) -> Iterator[None]:
    """Disable the adaptors of ``models`` inside the block; models without one stay as they are."""
    adapted = [model for model in models if getattr(model, "peft_config", None)]
    for model in adapted:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in adapted:
            model.enable_adapters()


def trained_parameters(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """The trainable parameters of UNet and VAE by name; those of the VAE begin with 'vae.'."""
    encoder = {f"vae.{name}": weight for name, weight in adaptor_parameters(model.vae).items()}
    return adaptor_parameters(model.unet) | encoder


def adaptor_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a UNet or VAE by name, in the order of its modules."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def save_adaptor(
    unet: Any, metadata: AdaptorMetadata, schedule: dict[str, Any], out: Path, vae: Any = None
) -> Path:
    """Write weights, one-step scheduler and metadata to the new folder ``out``.

    The folder appears whole or not at all. Weights are stored in ``adaptor.dtype`` of the recipe in
    ``metadata``, or in float32 where it names none.

    Args:
        unet: The UNet2DConditionModel that ``add_adaptor`` was called on.
        metadata: Written as METADATA.
        schedule: The noise schedule, as ``DiffusionModel.schedule``.
        out: The folder to write.
        vae: If its encoder has an adaptor, the AutoencoderKL; its weights are written too.

    Raises:
        HipaError: a weight is not finite in that dtype, or ``out`` exists and is not empty.

    """
    dtype = stored_dtype(metadata)
    weights = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    check_storable(weights, dtype)

    # The LoRA configuration goes into the safetensors header: without it a loader assumes alpha =
    # rank. Names stay peft's: diffusers' own conversion renames the attention layers only, and its
    # loader then skips those without a word.
    config = unet.peft_config[ADAPTER].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    stored = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    with new_folder(out) as scratch:
        StableDiffusionPipeline.save_lora_weights(
            scratch, unet_lora_layers=stored, unet_lora_adapter_metadata=config
        )
        finish_file(scratch / WEIGHTS, dtype)
        if vae is not None:
            save_encoder_adaptor(vae, scratch, dtype)
        one_step_scheduler(schedule, metadata.timestep).save_pretrained(scratch / "scheduler")
        (scratch / METADATA).write_text(metadata.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return out


def stored_dtype(metadata: AdaptorMetadata) -> torch.dtype:
    """The dtype in which the weights of an adaptor with this record are stored."""
    name = metadata.recipe.get("adaptor", {}).get("dtype", "float32")
    return {"float16": torch.float16, "float32": torch.float32}[name]


def attach_adaptor(unet: Any, folder: Path) -> None:
    """Add a trained adaptor to a UNet2DConditionModel for inference, in place.

    It does what ``pipe.load_lora_weights`` does.

    Raises:
        HipaError: the file is damaged or does not fit.

    """
    attach_lora(unet, "unet", folder / WEIGHTS)


def one_step_model(
    model: DiffusionModel, timestep: int, adaptor: Path | None
) -> Callable[[Tensor, Conditions], Tensor]:
    """The text-to-image model as a function of noise and conditions.

    Args:
        model: The base model. With ``adaptor`` it is changed in place.
        timestep: Where the step starts; with ``adaptor`` it starts where that was trained instead.
        adaptor: Adaptor folder, or None for the base model.

    Returns:
        A function (noise [B, C, H, W], conditions) -> x0 latents, float32 [B, C, H, W].

    Raises:
        HipaError: the adaptor is damaged, for another task, or was trained on another base model or
            with other LoRAs.

    Example:
        >>> generate = one_step_model(model, 999, Path("adaptor"))
        >>> generate(model.noise([0]), model.conditions(["a cat"])).shape
        torch.Size([1, 4, 64, 64])

    """
    if adaptor is not None:
        metadata = read_metadata(adaptor, model.folder)
        check_schedule(adaptor, metadata, model.config)
        check_same_loras(adaptor, metadata.loras, model.style.loras)
        if metadata.task != "generate":
            raise HipaError(
                f"adaptor {adaptor} is for the task {metadata.task}. "
                "Expected one for text to image."
            )
        # The adaptor knows one timestep; a recipe's own would start where it was never trained.
        timestep = metadata.timestep
        attach_adaptor(model.unet, adaptor)
    return partial(
        one_step_latents,
        model.unet,
        timestep=timestep,
        alpha_bar=model.alpha_bar(timestep),
        prediction_type=model.prediction_type,
    )


def check_start(recipe: Recipe, adaptor: Path, model_dir: Path, style: Style) -> None:
    """Check that a training may start from an adaptor, before any weights are loaded.

    It is what inference checks too: on another schedule, without its LoRAs or with another layer of
    the text encoder the adaptor does not make the images that it has learned to make.

    Args:
        recipe: Of the training.
        adaptor: The adaptor's folder.
        model_dir: Diffusers folder; its weights are not needed.
        style: LoRAs and embeddings of the training.

    Raises:
        HipaError: the model has another noise schedule than the adaptor's, its LoRAs are not given,
            or the recipe has another clip skip.

    """
    metadata = read_metadata(adaptor)
    config = ModelConfig.read(model_dir, recipe.task)
    check_schedule(adaptor, metadata, config)
    if metadata.loras:
        check_same_loras(adaptor, metadata.loras, OpenStyle.read(style, config).info.loras)
    trained = metadata.text.clip_skip
    if recipe.text.clip_skip != trained:
        raise HipaError(
            f"adaptor {adaptor} was trained with clip skip {trained}, and the recipe has "
            f"{recipe.text.clip_skip}. Set clip_skip = {trained} in its table [text], or start "
            "from another adaptor."
        )


def start_note(recipe: Recipe, adaptor: Path) -> str | None:
    """A warning if the recipe has another timestep than the adaptor to start from; None otherwise.

    It is no error: a training can move an adaptor to another timestep. An adaptor of another task
    is moved in any case, so nothing is said of it.

    Args:
        recipe: Of the training.
        adaptor: The folder of the adaptor to start from.

    """
    metadata = read_metadata(adaptor)
    if recipe.task != metadata.task or recipe.task == "edit":
        return None
    if recipe.timestep == metadata.timestep:
        return None
    return (
        f"warning: adaptor {adaptor} was trained for timestep {metadata.timestep}, and the recipe "
        f"asks it at {recipe.timestep}, which it has to learn anew. To go on as before, set "
        f"timestep = {metadata.timestep} in the recipe."
    )


def load_adaptor_weights(unet: Any, folder: Path) -> None:
    """Copy an adaptor's weights into the layers that ``add_adaptor`` made, to train on from there.

    Raises:
        HipaError: the file is damaged, or it has other layers, another rank or another alpha.

    """
    alpha = read_metadata(folder).alpha
    stored = load_tensors(folder / WEIGHTS)

    # Alpha is compared beside the shapes: another one would scale the same weights differently.
    weights = {name.removeprefix("unet."): weight for name, weight in stored.items()}
    expected = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    same_alpha = alpha == unet.peft_config[ADAPTER].lora_alpha
    if not (same_alpha and same_shapes(weights, expected)):
        raise HipaError(
            f"adaptor {folder} has another preset, rank or alpha than the recipe. "
            f"See its {METADATA}."
        )
    set_peft_model_state_dict(unet, weights, adapter_name=ADAPTER)
