"""The formats that are read with torch: model folders, adaptors, LoRAs, recipes, checkpoints.

Each is a valid sample, and the reader of ``tests.hostile.readers`` that stands for the command.
"""

from __future__ import annotations

import io
import json
import shutil
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
UNET = "model/unet/diffusion_pytorch_model.safetensors"


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


def _reads(reader: str) -> tuple[str, ...]:
    return ("read", f"tests.hostile.readers:{reader}")


def _model_file(name: str, file: str, kind: str = "json") -> Format:
    return Format(name, with_model, f"model/{file}", kind, _reads("model"), heavy=True)


FORMATS = (
    _model_file("model index", "model_index.json"),
    _model_file("unet config", "unet/config.json"),
    _model_file("vae config", "vae/config.json"),
    _model_file("text config", "text_encoder/config.json"),
    _model_file("scheduler config", "scheduler/scheduler_config.json"),
    _model_file("tokenizer config", "tokenizer/tokenizer_config.json"),
    _model_file("vocabulary", "tokenizer/vocab.json"),
    _model_file("unet weights", "unet/diffusion_pytorch_model.safetensors", "safetensors"),
    _model_file("text weights", "text_encoder/model.safetensors", "safetensors"),
    Format(
        "fast tokenizer",
        with_fast_tokenizer,
        "model/tokenizer/tokenizer.json",
        "json",
        _reads("model"),
        heavy=True,
    ),
    Format("shards", with_shards, f"{UNET}.index.json", "json", _reads("model"), heavy=True),
    Format(
        "pickled unet",
        with_pickled_unet,
        "model/unet/diffusion_pytorch_model.bin",
        "pickle",
        _reads("model"),
        heavy=True,
    ),
    Format(
        "dry run", with_model, "model/unet/config.json", "json", _reads("training_cost"), heavy=True
    ),
    Format(
        "adaptor", with_adaptor, "adaptor/hipa_adaptor.json", "json", _reads("adaptor"), heavy=True
    ),
    Format(
        "adaptor weights",
        with_adaptor,
        "adaptor/pytorch_lora_weights.safetensors",
        "safetensors",
        _reads("adaptor"),
        heavy=True,
    ),
    Format(
        "encoder weights",
        with_adaptor,
        "adaptor/vae_encoder_lora.safetensors",
        "safetensors",
        _reads("adaptor"),
        heavy=True,
    ),
    Format(
        "kohya lora",
        with_style,
        "lora-kohya.safetensors",
        "safetensors",
        _reads("style"),
        heavy=True,
    ),
    Format("pickled lora", with_style, "lora-pickled.pt", "pickle", _reads("style"), heavy=True),
    Format(
        "peft config",
        with_style,
        "lora-peft/adapter_config.json",
        "json",
        _reads("style"),
        heavy=True,
    ),
    Format(
        "embedding",
        with_style,
        "embedding.safetensors",
        "safetensors",
        _reads("style"),
        heavy=True,
    ),
    Format(
        "pickled embedding", with_style, "embedding-dog.pt", "pickle", _reads("style"), heavy=True
    ),
    Format(
        "decoder", with_decoder, "decoder/hipa_decoder.json", "json", _reads("decoder"), heavy=True
    ),
    Format(
        "decoder config", with_decoder, "decoder/config.json", "json", _reads("decoder"), heavy=True
    ),
    Format("one-step method", with_method, "method.toml", "toml", _reads("one_step"), heavy=True),
    Format("recipe", with_recipe, "recipe.toml", "toml", _reads("recipe"), heavy=True),
    Format(
        "checkpoint",
        with_checkpoint,
        "checkpoint.safetensors",
        "safetensors",
        _reads("checkpoint"),
        heavy=True,
    ),
    Format(
        "pickled checkpoint",
        with_pickled_checkpoint,
        "checkpoint.ckpt",
        "pickle",
        _reads("checkpoint"),
        heavy=True,
    ),
    Format(
        "checkpoint's index",
        with_checkpoint,
        "model/model_index.json",
        "json",
        _reads("checkpoint"),
        heavy=True,
    ),
    Format("run state", with_run, "adaptor.run/state.pt", "pickle", _reads("train"), heavy=True),
    Format(
        "teacher pairs",
        with_run,
        "cache/*/*/*.safetensors",
        "safetensors",
        _reads("train"),
        heavy=True,
    ),
)
