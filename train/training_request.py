"""The checks of a training's request, which need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA, AdaptorMetadata
from hipa_deploy.models.clip_tokenizer import text_sizes
from hipa_deploy.models.early_config import EarlyConfig, early_config
from hipa_deploy.models.lora.early_lora import check_adaptor, check_style
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import Style
from hipa_deploy.models.weights.load_part import check_weights
from hipa_deploy.train.data.captions import folder_captions, image_paths
from hipa_deploy.train.data.edit_prompts import check_related
from hipa_deploy.train.losses.clip_folder import FETCH_CLIP, SCORER, check_clip_folder
from hipa_deploy.train.recipes.recipe import (
    DecoderRecipe,
    Recipe,
    check_crop,
    check_distribution_terms,
    check_factor,
    check_levels,
    held_out_prompts,
    read_prompts,
)

# accelerate's trackers: the module that each needs, and the package that has it.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "aim": ("aim", "aim"),
    "clearml": ("clearml", "clearml"),
    "dvclive": ("dvclive", "dvclive"),
    "swanlab": ("swanlab", "swanlab"),
}


def check_request(
    recipe: Recipe | DecoderRecipe, model: Path, start: Path | None, style: Style
) -> None:
    """Check a request before anything is loaded.

    Args:
        recipe: of an adaptor or a decoder.
        model: the diffusers folder of the base model.
        start: the adaptor to start from, or the one that a decoder will be used with.
        style: LoRAs and embeddings of the model.

    Raises:
        HipaError: prompts, images or a scorer are missing or cannot be read; sizes, timesteps,
            terms of the loss or a decoder's levels do not fit the model; an adaptor or a LoRA is
            missing, damaged or does not fit the model or the recipe; or the model is incomplete.

    """
    prompts = read_prompts(recipe, model)
    held_out_prompts(recipe, model, trained_prompts(recipe, prompts))
    if isinstance(recipe, Recipe) and recipe.task == "edit":
        check_related(with_captions(recipe, prompts), recipe.source.same)
    config = early_config(model)
    _check_size(recipe, config)
    _check_timestep(recipe, config, start)
    if isinstance(recipe, Recipe):
        check_held_out(recipe, config)
        check_crop(recipe.decode_crop, config.latents_of(recipe.size))
        check_distribution_terms(recipe, config)
    else:
        check_levels(recipe.decoder, config)
    check_weights(model)
    if isinstance(recipe, Recipe) and recipe.image_folder:
        image_paths(recipe.image_folder)
    if isinstance(recipe, Recipe) and recipe.latent_discriminator.real_images:
        image_paths(Path(recipe.latent_discriminator.real_images))
    if isinstance(recipe, Recipe):
        _check_scorer(recipe)
    _check_files(recipe, model, config, start, style)


def check_dry_run(recipe: Recipe, model: Path, start: Path | None, style: Style) -> None:
    """Check the request of a prediction, for which the model's configuration is enough.

    Its prompts are not read here: the prediction does without them, and says what is wrong.

    Args:
        recipe: of an adaptor.
        model: the diffusers folder of the base model, with or without weights.
        start: the adaptor to start from.
        style: LoRAs and embeddings of the model.

    Raises:
        HipaError: the configuration cannot be read; the recipe's resolution or timestep does not
            fit it; its scorer is no folder of a CLIP; or, where the weights are there, an adaptor
            or a LoRA is damaged or does not fit.

    """
    config = early_config(model)
    _check_size(recipe, config)
    _check_timestep(recipe, config, start)
    check_held_out(recipe, config)
    _check_scorer(recipe)
    try:
        check_weights(model)
    except HipaError:
        return
    _check_files(recipe, model, config, start, style)


def check_held_out(recipe: Recipe, config: ModelConfig) -> None:
    """Check that the model can make the images of the held-out prompts.

    Raises:
        HipaError: it was made for inpainting, and makes no images of prompts.

    """
    if recipe.held_out.prompts and recipe.source_folder and config.is_inpainting:
        raise HipaError(
            f"{config.folder} fills holes only and makes no images of held-out prompts. The "
            "images of source.images are trained on and measure nothing. Leave held_out.prompts "
            "out of the recipe."
        )


def trained_prompts(recipe: Recipe | DecoderRecipe, prompts: list[str]) -> list[str]:
    """The prompts that are not held out: the recipe's, and the captions of its folder of images.

    Args:
        recipe: Names the folder.
        prompts: As ``read_prompts`` returns them.

    Raises:
        HipaError: As ``folder_captions``.

    """
    if not isinstance(recipe, Recipe) or not recipe.held_out.prompts:
        return prompts
    return with_captions(recipe, prompts)


def with_captions(recipe: Recipe, prompts: list[str]) -> list[str]:
    """The recipe's prompts, and the captions of its folder of images, where it reads any.

    Args:
        recipe: Names the folder.
        prompts: As ``read_prompts`` returns them.

    Raises:
        HipaError: As ``folder_captions``.

    """
    if recipe.image_folder is None or not recipe.source.captions:
        return prompts
    # What has no caption is told where the examples are made.
    quiet = Console(quiet=True)
    return [
        *prompts,
        *folder_captions(recipe.image_folder, image_paths(recipe.image_folder), quiet),
    ]


def _check_scorer(recipe: Recipe) -> None:
    """Raise HipaError where the recipe names a scorer's folder that is none of a CLIP."""
    settings = recipe.alignment
    if settings.weight and settings.scorer and not settings.is_code:
        check_clip_folder(Path(settings.scorer), SCORER, FETCH_CLIP)


def _check_size(recipe: Recipe | DecoderRecipe, config: EarlyConfig) -> None:
    """Raise HipaError unless the size of the recipe's images fits the model and the task."""
    if not isinstance(recipe, Recipe):
        return
    if recipe.size is not None:
        config.latents_of(recipe.size)
    if recipe.task == "upscale":
        check_factor(recipe, recipe.size or config.native_size)


def _check_timestep(
    recipe: Recipe | DecoderRecipe, config: EarlyConfig, start: Path | None
) -> None:
    """Raise HipaError unless the model's schedule has the timestep at which the step starts."""
    # An edit starts at those of its strengths, and a decoder's latents at that of their adaptor.
    is_edit = isinstance(recipe, Recipe) and recipe.task == "edit"
    is_of_adaptor = isinstance(recipe, DecoderRecipe) and start is not None
    if not (is_edit or is_of_adaptor):
        config.alpha_bar(recipe.timestep)


def _check_files(
    recipe: Recipe | DecoderRecipe,
    model: Path,
    config: EarlyConfig,
    start: Path | None,
    style: Style,
) -> None:
    """Raise HipaError unless the files that are given fit the model and the recipe."""
    check_style(style, model)
    recipe_text: TextSettings = recipe.text
    recipe_text.check(*text_sizes(config))
    if start is None:
        return
    metadata = check_adaptor(start, model)
    if metadata is None:
        raise HipaError(
            f"adaptor {start} has no {METADATA}. Expected a folder that hipa-train wrote."
        )
    if isinstance(recipe, Recipe):
        _check_start(recipe, start, metadata)
    elif metadata.task != "generate":
        raise HipaError(
            f"adaptor {start} is for the task {metadata.task}. Expected one for text to image."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Check the names of ``--log-with``, and that their packages are installed.

    Raises:
        HipaError: accelerate has no tracker of that name, or its package is not installed.

    """
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise HipaError(f"--log-with {shown(name)} is unknown. Expected one of: {known}.")
        module, package = TRACKERS[name]
        if find_spec(module) is None:
            raise HipaError(
                f"--log-with {name} needs package {package}, not installed; run: pip install "
                f"{package}"
            )


def _check_start(recipe: Recipe, start: Path, metadata: AdaptorMetadata) -> None:
    """Raise HipaError unless the recipe's layers can take the weights of the adaptor."""
    rank = recipe.adaptor.rank
    alpha = recipe.adaptor.alpha or rank
    if (metadata.rank, metadata.alpha) != (rank, alpha):
        raise HipaError(
            f"adaptor {start} has another preset, rank or alpha than the recipe: rank "
            f"{metadata.rank} and alpha {metadata.alpha:g}, expected {rank} and {alpha:g}. "
            "Set them in the recipe's table [adaptor]."
        )
