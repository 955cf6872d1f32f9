"""The formats that are read with torch: model folders, adaptors, LoRAs, recipes, checkpoints.

Each is a valid sample, and the reader of ``tests.hostile.readers`` that stands for the command.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from hipa_deploy.embedded import DECODER
from hipa_deploy.models.one_step.one_step_method import PRESETS
from hipa_deploy.train.recipes.recipe import load_recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.hostile.harness import Format
from tests.original_layout import write_checkpoint
from tests.style_samples import write_embedding, write_lora
from tests.tiny_model import make_model

RECIPE = """\
prompts = "model:prompts.txt"
steps = 2
batch = 2
samples = 1
timestep = 999
seed = 3
ema_decay = 0.5
checkpoint_every = 1
sample_every = 100
[adaptor]
preset = "paper"
rank = 2
[teacher]
steps = 2
pairs = 2
batch = 2
guidance = 5.0
[loss]
perceptual = "none"
hf_weight = 0.0
pixel_weight = 1.0
[optimiser]
learning_rate = 0.01
"""
UPSCALE = RECIPE.replace("[adaptor]", 'task = "upscale"\n[adaptor]\nencoder_rank = 2')
UNET_STEM = "model/unet/diffusion_pytorch_model"
UNET = f"{UNET_STEM}.safetensors"
Write = Callable[[Path], object]


def with_model(folder: Path) -> None:
    make_model(folder / "model")
    shutil.rmtree(folder / "model-tokenizer")


def with_shards(folder: Path) -> None:
    with_model(folder)
    whole = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: whole[name] for name in part}, folder / "model/unet" / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = folder / f"{UNET}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_pickled_unet(folder: Path) -> None:
    with_model(folder)
    path = folder / UNET
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def with_fast_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizerFast

    with_model(folder)
    tokenizer = folder / "model/tokenizer"
    CLIPTokenizerFast.from_pretrained(tokenizer).save_pretrained(tokenizer)


def with_adaptor(folder: Path) -> None:
    """An adaptor with a part for the VAE's encoder; the training that made it is removed."""
    _train(folder, UPSCALE, steps=None)
    for name in ("cache", "adaptor.run"):
        shutil.rmtree(folder / name)


def with_style(folder: Path) -> None:
    with_model(folder)
    write_lora(folder / "model", folder / "lora-kohya.safetensors", seed=0)
    write_lora(folder / "model", folder / "lora.safetensors", seed=1, kohya=False)
    torch.save(load_file(folder / "lora.safetensors"), folder / "lora-pickled.pt")
    write_embedding(folder / "embedding.safetensors", "<cat>", count=2)
    content = {"string_to_param": {"*": torch.ones(2, 16)}, "name": "dog", "step": 7}
    torch.save(content, folder / "embedding-dog.pt")
    _peft_folder(folder)


def _peft_folder(folder: Path) -> None:
    """The same LoRA as peft saves it, with a configuration of patterns."""
    peft = folder / "lora-peft"
    peft.mkdir()
    tensors = load_file(folder / "lora.safetensors")
    unet = {name: value for name, value in tensors.items() if name.startswith("unet.")}
    save_file(
        {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in unet.items()},
        peft / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q"],
        "rank_pattern": {},
        "alpha_pattern": {"to_q": 8, r"mid_block\..*": 1},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    (peft / "adapter_config.json").write_text(json.dumps(config))


def with_decoder(folder: Path) -> None:
    shutil.copytree(DECODER, folder / "decoder")


def with_method(folder: Path) -> None:
    text = (PRESETS / "tcd-sd15.toml").read_text()
    (folder / "method.toml").write_text(text.replace('family = "sd1"\n', ""))


def with_recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text(UPSCALE)


def with_checkpoint(folder: Path) -> None:
    with_model(folder)
    write_checkpoint(folder / "model", folder / "checkpoint.safetensors")


def with_pickled_checkpoint(folder: Path) -> None:
    with_model(folder)
    write_checkpoint(folder / "model", folder / "whole.safetensors")
    torch.save({"state_dict": load_file(folder / "whole.safetensors")}, folder / "checkpoint.ckpt")
    (folder / "whole.safetensors").unlink()


def with_run(folder: Path) -> None:
    """A training that stopped after one of two steps."""
    _train(folder, RECIPE, steps=1)
    shutil.rmtree(folder / "adaptor")
    # A run of two steps that was stopped has the recipe of two.
    path = folder / "adaptor.run/state.pt"
    state = torch.load(path, weights_only=True)
    identity = json.loads(state["identity"])
    identity["recipe"]["steps"] = 2
    torch.save({**state, "identity": json.dumps(identity)}, path)


def _train(folder: Path, recipe: str, steps: int | None) -> None:
    with_model(folder)
    path = folder / "recipe.toml"
    path.write_text(recipe)
    train_adaptor(
        load_recipe(path, {} if steps is None else {"steps": steps}),
        folder / "model",
        folder / "adaptor",
        cache=folder / "cache",
        console=Console(file=io.StringIO()),
        device="cpu",
    )


STYLE = {
    "kohya lora": ("lora-kohya.safetensors", "safetensors"),
    "pickled lora": ("lora-pickled.pt", "pickle"),
    "peft config": ("lora-peft/adapter_config.json", "json"),
    "embedding": ("embedding.safetensors", "safetensors"),
    "pickled embedding": ("embedding-dog.pt", "pickle"),
}
MODEL_FILES = {
    "model index": ("model_index.json", "json"),
    "unet config": ("unet/config.json", "json"),
    "vae config": ("vae/config.json", "json"),
    "text config": ("text_encoder/config.json", "json"),
    "scheduler config": ("scheduler/scheduler_config.json", "json"),
    "tokenizer config": ("tokenizer/tokenizer_config.json", "json"),
    "vocabulary": ("tokenizer/vocab.json", "json"),
    "unet weights": ("unet/diffusion_pytorch_model.safetensors", "safetensors"),
    "text weights": ("text_encoder/model.safetensors", "safetensors"),
}
ADAPTOR_FILES = {
    "adaptor": ("hipa_adaptor.json", "json"),
    "adaptor weights": ("pytorch_lora_weights.safetensors", "safetensors"),
    "encoder weights": ("vae_encoder_lora.safetensors", "safetensors"),
}


def _format(name: str, write: Write, file: str, kind: str, reader: str) -> Format:
    command = ("read", f"tests.hostile.readers:{reader}")
    return Format(name, write, file, kind, command, heavy=True)


FORMATS = (
    *(
        _format(name, with_model, f"model/{file}", kind, "model")
        for name, (file, kind) in MODEL_FILES.items()
    ),
    *(
        _format(name, with_adaptor, f"adaptor/{file}", kind, "adaptor")
        for name, (file, kind) in ADAPTOR_FILES.items()
    ),
    *(_format(name, with_style, file, kind, "style") for name, (file, kind) in STYLE.items()),
    # The same files, as every command checks them before it imports torch.
    *(
        _format(f"early {name}", with_style, f"model/{file}", kind, "early")
        for name, (file, kind) in MODEL_FILES.items()
        if "config" in file
    ),
    *(
        _format(f"early {name}", with_adaptor, f"adaptor/{file}", kind, "early")
        for name, (file, kind) in ADAPTOR_FILES.items()
    ),
    *(
        _format(f"early {name}", with_style, file, kind, "early")
        for name, (file, kind) in STYLE.items()
    ),
    _format(
        "fast tokenizer", with_fast_tokenizer, "model/tokenizer/tokenizer.json", "json", "model"
    ),
    _format("shards", with_shards, f"{UNET}.index.json", "json", "model"),
    _format("pickled unet", with_pickled_unet, f"{UNET_STEM}.bin", "pickle", "model"),
    _format("dry run", with_model, "model/unet/config.json", "json", "training_cost"),
    _format("decoder", with_decoder, "decoder/hipa_decoder.json", "json", "decoder"),
    _format("decoder config", with_decoder, "decoder/config.json", "json", "decoder"),
    _format("one-step method", with_method, "method.toml", "toml", "one_step"),
    _format("recipe", with_recipe, "recipe.toml", "toml", "recipe"),
    _format("checkpoint", with_checkpoint, "checkpoint.safetensors", "safetensors", "checkpoint"),
    _format(
        "pickled checkpoint", with_pickled_checkpoint, "checkpoint.ckpt", "pickle", "checkpoint"
    ),
    _format("checkpoint's index", with_checkpoint, "model/model_index.json", "json", "checkpoint"),
    _format("run state", with_run, "adaptor.run/state.pt", "pickle", "train"),
    _format("teacher pairs", with_run, "cache/*/*/*.safetensors", "safetensors", "train"),
)
