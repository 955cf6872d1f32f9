"""What the commands read of a model, without the minutes of work that come after it.

Each function takes the folder of a sample. It runs in the worker's child as a command would: its
errors are printed and counted alike.
"""

from __future__ import annotations

from pathlib import Path

from hipa_deploy.errors import HipaError
from hipa_deploy.models.style import Style, parse_style


def image(folder: Path) -> None:
    """An image and a mask, as ``hipa edit``, ``inpaint`` and ``upscale`` read them."""
    from hipa_deploy.images.read import read_image, read_mask

    for path in folder.glob("image.*"):
        read_image(path)
        read_mask(path)


def prompts(folder: Path) -> None:
    """A file of prompts, as ``--prompts`` and recipes read it."""
    from hipa_deploy.generate.prompt_files import read_prompt_file

    read_prompt_file(next(folder.glob("prompts.*"), folder / "prompts.txt"))


def captions(folder: Path) -> None:
    """A folder of images with captions, as a recipe's ``[source]`` reads it."""
    from hipa_deploy.train.data.captions import folder_captions, image_paths

    folder_captions(folder, image_paths(folder), None)


def coco(folder: Path) -> None:
    """A folder of MS-COCO, as ``hipa evaluate --coco`` reads it."""
    from hipa_deploy.train.coco.coco_folder import find_sets, read_coco

    for captions in ("random", "first"):
        read_coco(folder, find_sets(folder, 2017)[0], captions=captions)


def coco_features(folder: Path) -> None:
    """Features that an earlier run kept, as ``hipa evaluate --coco`` reads them."""
    from hipa_deploy.train.coco.parts import Parts

    Parts(folder, 6).read("features")


def model(folder: Path) -> None:
    """A model folder, as ``hipa export`` opens it."""
    from hipa_deploy.export.model_parts import ModelParts
    from hipa_deploy.models.clip_tokenizer import prompt_tokenizer

    parts = ModelParts.open(str(folder / "model"))
    parts.one_step(parts.config.last_timestep, None, None)
    assert parts.info
    parts.unet()
    parts.vae()
    parts.text_encoder()
    prompt_tokenizer(parts.tokenizer())(["a red apple"])


def early(folder: Path) -> None:
    """What every command checks before it imports torch, of a model and all that goes with it."""
    from hipa_deploy.models.early_config import early_config
    from hipa_deploy.models.lora.early_lora import check_adaptor, check_style

    config = early_config(folder / "model")
    assert config.native_size
    config.alpha_bar(min(999, config.last_timestep))
    if (folder / "adaptor").exists():
        check_adaptor(folder / "adaptor", folder / "model")
    check_style(_style(folder), folder / "model")


def training_cost(folder: Path) -> None:
    """A model folder, as ``hipa train --dry-run`` opens it."""
    from hipa_deploy.train.prediction.simulated_training import unloaded_model

    unloaded_model(folder / "model")


def adaptor(folder: Path) -> None:
    """An adaptor folder, as ``hipa export`` and ``hipa evaluate`` open it."""
    from hipa_deploy.export.merge import merge_adaptor, merge_encoder_adaptor
    from hipa_deploy.export.model_parts import ModelParts
    from hipa_deploy.models.adaptor_folder import read_metadata, weights_sha256
    from hipa_deploy.train.model.encoder_adaptor import attach_encoder_adaptor
    from hipa_deploy.train.model.unet_adaptor import attach_adaptor

    parts = ModelParts.open(str(folder / "model"))
    metadata = read_metadata(folder / "adaptor", parts.folder)
    parts.one_step(metadata.timestep, None, None)
    weights_sha256(folder / "adaptor")
    merge_adaptor(parts.unet(), folder / "adaptor")
    merge_encoder_adaptor(parts.vae(), folder / "adaptor")
    attach_adaptor(parts.unet(), folder / "adaptor")
    attach_encoder_adaptor(parts.vae(), folder / "adaptor")


def style(folder: Path) -> None:
    """LoRAs and embeddings, as ``--lora`` and ``--embedding`` read them."""
    from hipa_deploy.export.model_parts import ModelParts
    from hipa_deploy.models.lora.open_style import OpenStyle

    parts = ModelParts.open(str(folder / "model"))
    opened = OpenStyle.read(_style(folder), parts.config)
    encoder = parts.text_encoder()
    opened.merge({"unet": parts.unet(), "text_encoder": encoder})
    opened.add_words(parts.tokenizer(), encoder)


def _style(folder: Path) -> Style:
    """The LoRAs and embeddings that lie in a sample, by their names."""
    files: dict[str, list[str]] = {"lora": [], "embedding": []}
    for path in sorted(folder.iterdir()):
        kind = path.name.partition(".")[0].partition("-")[0]
        if kind in files:
            files[kind].append(str(path))
    return parse_style(files["lora"], files["embedding"])


def decoder(folder: Path) -> None:
    """A tiny decoder's folder, as ``--decoder`` reads it."""
    from hipa_deploy.export.model_parts import ModelParts

    ModelParts.open("emoji").tiny_decoder(folder / "decoder")


def one_step(folder: Path) -> None:
    """A one-step method, as ``--one-step`` reads it."""
    from hipa_deploy.export.model_parts import ModelParts
    from hipa_deploy.models.one_step.one_step_method import load_method

    ModelParts.open("emoji").one_step(999, None, None, load_method(str(folder / "method.toml")))


def recipe(folder: Path) -> None:
    """A recipe, as ``hipa train`` reads it."""
    from hipa_deploy.embedded import MODEL
    from hipa_deploy.train.recipes.recipe import load_any_recipe, read_prompts

    read_prompts(load_any_recipe(folder / "recipe.toml"), MODEL)


def checkpoint(folder: Path) -> None:
    """A checkpoint in one file, as ``--model`` reads it."""
    from hipa_deploy.models.locate import model_folder

    files = [path for path in folder.iterdir() if path.name.startswith("checkpoint.")]
    if not files:
        raise HipaError("the checkpoint is gone")
    model_folder(str(files[0]), str(folder / "model"))


def train(folder: Path) -> None:
    """A training that goes on from its checkpoint and its cache of teacher pairs."""
    import io

    from rich.console import Console

    from hipa_deploy.train.recipes.recipe import load_recipe
    from hipa_deploy.train.train_adaptor import train_adaptor

    train_adaptor(
        load_recipe(folder / "recipe.toml"),
        folder / "model",
        folder / "adaptor",
        cache=folder / "cache",
        console=Console(file=io.StringIO()),
        device="cpu",
    )
