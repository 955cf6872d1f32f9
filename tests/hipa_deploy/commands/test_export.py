"""``hipa-export``: mistakes are refused before anything is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hipa_deploy.models.single_file import CROSS_ATTENTION, SDXL_CROSS_ATTENTION
from tests.original_layout import write_checkpoint
from tests.tiny_model import make_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such", "--dtype", "int3"], "--dtype"),
        (["--model", "emoji", "--task", "paint"], "--task"),
        (["--model", "emoji", "--strengths", "a,b"], "--strengths 'a,b': expected numbers"),
        (["--model", "emoji", "--strengths", "0.5"], "--strengths is for the task edit"),
        (["--model", "emoji", "--config", "sd15"], "--config is for a checkpoint in one file"),
        (["--model", "emoji", "--swap-for", "emoji"], "--swap-for needs --adaptor"),
        (["--model", "emoji", "--context-tokens", "80"], "Expected one of: 77, 154, 231"),
        (["--model", "emoji", "--clip-skip", "99"], "leaves no layer"),
        (
            ["--model", "emoji", "--adaptor", "emoji", "--clip-skip", "1"],
            "trained with clip skip 0, not 1. Leave out --clip-skip",
        ),
        (["--model", "emoji", "--decoder", __file__], "is a file. Expected full, tiny, or an Auto"),
        (["--model", "emoji", "--decoder", "/no/such"], "--decoder /no/such does not exist. Exp"),
        (["--model", "emoji", "--one-step", "quick"], "one-step method 'quick' does not exist"),
        (["--model", "emoji", "--one-step", "lcm-sd15"], "is a LoRA. Give its file with --adaptor"),
        (
            ["--model", "emoji", "--adaptor", "emoji", "--one-step", "lcm-sd15"],
            "Leave out --one-step lcm-sd15",
        ),
        (["--model", "emoji", "--for", "orin"], "--for 'orin' is no target"),
        (["--model", "emoji", "--for", "orin-nano", "--build", "rtx"], "Leave out --build"),
        (
            ["--model", "emoji", "--for", "orin-nano", "--layout", "generic"],
            "Leave out --layout generic, or give --decoder full",
        ),
        (
            [
                *("--model", "emoji", "--for", "orin-nano", "--batch", "64"),
                *("--height", "2048", "--width", "2048"),
            ],
            "What would fit: --batch 1 (",
        ),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("export", "--out", "x", *arguments)


@pytest.mark.parametrize(
    "option",
    [
        ["--dtype", "fp32"],
        ["--layout", "generic"],
        ["--height", "64"],
        ["--width", "64"],
        ["--batch", "2"],
        ["--fuse"],
        ["--prompts", "prompts.txt"],
        ["--dynamic", "batch=1:1:4"],
        ["--task", "edit"],
        ["--strengths", "0.5"],
        ["--encoder", "tiny"],
        ["--build", "rtx"],
        ["--context-tokens", "154"],
        ["--clip-skip", "1"],
        ["--no-prompt-weights"],
        ["--for", "orin-nano"],
    ],
)
def test_a_swap_takes_no_option_that_the_bundle_decides(
    option: list[str], refused: Callable[..., str]
) -> None:
    error = refused("export", "--model", "emoji", "--out", "x", "--swap-for", "emoji", *option)
    assert "the bundle decides everything else" in error


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_part_in_float8_is_refused_before_the_export(
    part: str,
    refused: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny")
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    narrow = {name: one.to(torch.float8_e4m3fn) for name, one in load_file(weights).items()}
    save_file(narrow, weights)

    def late(*_: object) -> None:
        pytest.fail("the export has begun")

    monkeypatch.setattr("hipa_deploy.export.export_bundle.export_checked", late)
    error = refused("export", "--model", str(folder), "--out", "x")
    assert "is stored as F8_E4M3. Expected F64, F32, F16, BF16" in error


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


EXPORT = ("export", "--out", "x")
SWAP = ("export", "--out", "x", "--swap-for", "emoji")
TRAIN = ("train", "--out", "x", "--recipe", "emoji")
EVALUATE = ("evaluate", "--prompts", "prompts.txt")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((EXPORT, option) for option in ("--lora", "--embedding", "--adaptor")),
        *((SWAP, option) for option in ("--lora", "--adaptor")),
        *((TRAIN, option) for option in ("--lora", "--embedding", "--from")),
        *((EVALUATE, option) for option in ("--adaptor", "--rival")),
        ((*EVALUATE, "--adaptor", "emoji"), "--lora"),
    ],
)
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_damaged_file_is_named_before_a_checkpoint_is_converted(
    command: tuple[str, ...],
    option: str,
    ending: str,
    refused: Callable[..., str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To convert or to fetch a model takes minutes."""
    elsewhere = tmp_path_factory.mktemp("model")
    monkeypatch.setenv("HIPA_CACHE", str(elsewhere / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    pointer = elsewhere / f"style{ending}"
    pointer.write_text(POINTER)
    checkpoint = elsewhere / "mine.safetensors"
    checkpoint.write_text(POINTER)  # it is not even looked at
    value = f"{pointer}=hyper-sd15" if option == "--rival" else str(pointer)
    error = refused(*command, "--model", str(checkpoint), option, value)
    assert f"{pointer} is a Git LFS pointer, not the weights" in error


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (EXPORT, "--lora"),
        (EXPORT, "--adaptor"),
        (SWAP, "--lora"),
        (TRAIN, "--lora"),
        (EVALUATE, "--adaptor"),
    ],
)
@pytest.mark.parametrize(("width", "family"), [(768, "SD 1.x"), (2048, "SDXL")])
def test_a_lora_of_another_family_is_named_before_a_checkpoint_is_converted(
    command: tuple[str, ...],
    option: str,
    width: int,
    family: str,
    refused: Callable[..., str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    elsewhere = tmp_path_factory.mktemp("model")
    checkpoint = elsewhere / "mine.safetensors"
    place = CROSS_ATTENTION if width == 768 else SDXL_CROSS_ATTENTION
    save_file({place: torch.ones(4, width)}, checkpoint)  # all that is looked at
    lora = elsewhere / "style.safetensors"
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    down = torch.ones(2, 1024)
    save_file(
        {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": torch.ones(4, 2)}, lora
    )
    error = refused(*command, "--model", str(checkpoint), option, str(lora))
    assert f"{lora} is a LoRA for SD 2.x: {layer} takes text contexts 1024 wide." in error
    assert f"Expected one for {family}, as the model is." in error


def test_a_swap_of_a_checkpoint_with_its_configuration(
    refused: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = tmp_path_factory.mktemp("model")
    monkeypatch.setenv("HIPA_CACHE", str(elsewhere / "cache"))
    folder = make_model(elsewhere / "tiny")
    checkpoint = write_checkpoint(folder, elsewhere / "mine.safetensors")
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    height, width = unet["time_embedding.linear_1.weight"].shape
    layer = "unet.time_embedding.linear_1"
    lora = elsewhere / "style.safetensors"
    matrices = {"A": torch.ones(2, width), "B": torch.ones(height, 2)}
    save_file({f"{layer}.lora_{name}.weight": one for name, one in matrices.items()}, lora)
    named = ("--model", str(checkpoint), "--config", str(folder), "--lora", str(lora))
    error = refused("export", *named, "--swap-for", "emoji", "--out", "x")
    assert "was exported from another base model" in error
