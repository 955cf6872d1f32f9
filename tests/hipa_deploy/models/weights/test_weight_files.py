"""Which of the files in a part's folder are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.weight_files import current_name, find_weights

UNET = "diffusion_pytorch_model"


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def write_index(folder: Path, name: str, *shards: str) -> None:
    places = {f"weight{i}": shard for i, shard in enumerate(shards)}
    (folder / name).write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([f"{UNET}.fp16.safetensors", f"{UNET}.safetensors"], f"{UNET}.safetensors"),
        ([f"{UNET}.non_ema.safetensors", f"{UNET}.safetensors"], f"{UNET}.safetensors"),
        ([f"{UNET}.bin", f"{UNET}.safetensors"], f"{UNET}.safetensors"),
        # Full precision comes first, whatever its format.
        ([f"{UNET}.bin", f"{UNET}.fp16.safetensors"], f"{UNET}.bin"),
        ([f"{UNET}.bf16.safetensors", f"{UNET}.fp16.bin"], f"{UNET}.fp16.bin"),
        ([f"{UNET}.non_ema.bin", f"{UNET}.bf16.safetensors"], f"{UNET}.bf16.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["model.safetensors", "tf_model.h5", "flax_model.msgpack"], "model.safetensors"),
        (["model.SafeTensors", "config.json"], "model.SafeTensors"),
    ],
)
def test_full_precision_first_then_safetensors(
    tmp_path: Path, names: list[str], chosen: str
) -> None:
    assert [path.name for path in find_weights(write(tmp_path, *names))] == [chosen]


@pytest.mark.parametrize(
    "index",
    [
        f"{UNET}.safetensors.index.json",
        f"{UNET}.fp16.safetensors.index.json",
        f"{UNET}.safetensors.index.fp16.json",
        f"{UNET}.safetensors.fp16.index.json",
        f"{UNET}.bin.index.json",
    ],
)
def test_shards_are_found_by_their_index(tmp_path: Path, index: str) -> None:
    shards = [f"{UNET}-00001-of-00002.safetensors", f"{UNET}-00002-of-00002.safetensors"]
    write(tmp_path, *shards)
    write_index(tmp_path, index, *shards, shards[0])
    assert [path.name for path in find_weights(tmp_path)] == shards


@pytest.mark.parametrize(("stem", "first"), [(UNET, "shards"), ("model", "file")])
def test_each_library_has_its_own_order(tmp_path: Path, stem: str, first: str) -> None:
    """diffusers' get_model_file looks for an index first, transformers' for one file."""
    write(tmp_path, f"{stem}.safetensors", "shards")
    write_index(tmp_path, f"{stem}.safetensors.index.json", "shards")
    expected = "shards" if first == "shards" else f"{stem}.safetensors"
    assert [path.name for path in find_weights(tmp_path)] == [expected]


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"absent does not exist. Expected a folder with weights"):
        find_weights(tmp_path / "absent")
    with pytest.raises(HipaError, match=f"has no weights: no {UNET} or model that ends in"):
        find_weights(write(tmp_path, "config.json"))
    write(tmp_path, f"{UNET}-00001-of-00002.safetensors")
    with pytest.raises(HipaError, match=r"has shards, and no \.index\.json"):
        find_weights(tmp_path)
    write(tmp_path, f"{UNET}.non_ema.bin")
    remedy = f"Rename {UNET}.non_ema.bin to {UNET}.bin to use it"
    with pytest.raises(HipaError, match=f"of the variant non_ema alone.*{remedy}"):
        find_weights(tmp_path)
    (tmp_path / f"{UNET}.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(HipaError, match=r"links to a file that is not there. Download the model"):
        find_weights(tmp_path)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    index = f"{UNET}.safetensors.index.json"
    write_index(tmp_path, index, "a", "b", "c")
    write(tmp_path, "b")
    with pytest.raises(HipaError, match=f"lacks 2 of the 3 files that {index} lists: a, c."):
        find_weights(tmp_path)
    for content in ("{}", "[]", '{"weight_map": 1}'):
        (tmp_path / index).write_text(content)
        with pytest.raises(HipaError, match=f"{index} is no index of shards"):
            find_weights(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mid_block.attentions.0.key.bias", "mid_block.attentions.0.to_k.bias"),
        ("encoder.mid_block.attentions.0.proj_attn.weight",
         "encoder.mid_block.attentions.0.to_out.0.weight"),
        ("final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("encoder.layers.3.mlp.fc1.bias", "text_model.encoder.layers.3.mlp.fc1.bias"),
        ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        # These are other layers, and keep their names: of AutoencoderTiny, the VAE and a UNet.
        ("encoder.layers.0.weight", "encoder.layers.0.weight"),
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
         "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    ],
)  # fmt: skip
def test_names_of_other_versions(old: str, new: str) -> None:
    assert current_name(old) == new
    assert current_name(new) == new
