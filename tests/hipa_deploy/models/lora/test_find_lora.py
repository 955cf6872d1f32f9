"""Which file a path to a LoRA means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.lora.find_lora import (
    PEFT_CONFIG,
    FoundFile,
    find_lora,
    has_peft_config,
    lora_sha256,
    own_name,
)


def touch(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_file_and_the_only_one_of_a_folder(tmp_path: Path) -> None:
    one = touch(tmp_path / "one.SAFETENSORS")
    assert find_lora(tmp_path) == find_lora(one) == (FoundFile(one),)
    touch(tmp_path / "two.safetensors")
    with pytest.raises(HipaError, match=r"found one\.SAFETENSORS, two\.safetensors"):
        find_lora(tmp_path)
    named = touch(tmp_path / "adapter_model.safetensors")
    assert find_lora(tmp_path) == (FoundFile(named),)


@pytest.mark.parametrize("ending", [".bin", ".PT", ".ckpt"])
def test_pickled_files(tmp_path: Path, ending: str) -> None:
    file = touch(tmp_path / f"old{ending}")
    assert find_lora(file) == (FoundFile(file),)


def test_a_folder_for_each_part(tmp_path: Path) -> None:
    unet = touch(tmp_path / "unet/adapter_model.safetensors")
    encoder = touch(tmp_path / "text_encoder/adapter_model.bin")
    expected = (FoundFile(unet, "unet"), FoundFile(encoder, "text_encoder"))
    assert find_lora(tmp_path) == expected


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="does not exist"):
        find_lora(tmp_path / "gone")
    with pytest.raises(HipaError, match=r"no pytorch_lora_weights.*or other LoRA in it"):
        find_lora(tmp_path)
    with pytest.raises(HipaError, match=r"is no LoRA file. Expected one that ends in: \.safet"):
        find_lora(touch(tmp_path / "notes.txt"))


def test_the_hash_counts_every_file(tmp_path: Path) -> None:
    """Of one file it is the file's own; peft's alpha is in the configuration beside it."""
    file = touch(tmp_path / "adapter_model.safetensors")
    assert lora_sha256(find_lora(tmp_path)) == file_sha256(file)
    hashes = set()
    for alpha in (1, 2):
        touch(tmp_path / "adapter_config.json", json.dumps({"lora_alpha": alpha}))
        hashes.add(lora_sha256(find_lora(tmp_path)))
    assert len(hashes) == 2


def test_peft_s_configuration_is_of_its_own_file_alone(tmp_path: Path) -> None:
    touch(tmp_path / PEFT_CONFIG, "{}")
    keys = {"other": "lora_unet_x.lora_up.weight", "renamed": "base_model.model.x.lora_A.weight"}
    for name, key in keys.items():
        save_file({key: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert not has_peft_config(tmp_path / "other.safetensors")
    assert has_peft_config(tmp_path / "renamed.safetensors")
    assert has_peft_config(touch(tmp_path / "adapter_model.bin"))
    assert not has_peft_config(touch(tmp_path / "other.bin"))
    other = tmp_path / "other.safetensors"
    assert lora_sha256(find_lora(other)) == file_sha256(other)


def test_a_file_in_the_hub_s_cache_has_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = touch(tmp_path / "blobs" / "0123")
    link = tmp_path / "snapshots" / "style.safetensors"
    link.parent.mkdir()
    link.symlink_to(blob)
    assert own_name(link) == "style.safetensors"
    monkeypatch.chdir(link.parent)
    assert own_name(Path()) == "snapshots"
    assert own_name(Path("..")) == tmp_path.name
