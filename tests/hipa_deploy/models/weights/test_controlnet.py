"""Which ControlNets are taken, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import resolve_controlnet
from hipa_deploy.models.weights.controlnet import (
    DEFAULTS,
    check_controlnet,
    check_whole,
    control_warning,
)
from hipa_deploy.models.weights.load_part import check_part
from hipa_deploy.models.weights.part_config import defaults_of
from tests.original_layout import write_checkpoint
from tests.tiny_controlnet import make_controlnet, write_original
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_the_defaults_are_those_of_the_library() -> None:
    known = defaults_of(ControlNetModel)
    assert {key: known[key] for key in DEFAULTS} == DEFAULTS
    of_unet = defaults_of(UNet2DConditionModel)
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        assert of_unet[key] == DEFAULTS[key]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def published(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control") / "edges"
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    ControlNetModel.from_unet(unet).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_with_the_names_of_diffusers_is_taken(
    model: Path, published: Path, tmp_path: Path
) -> None:
    file = tmp_path / "edges.safetensors"
    file.write_bytes((published / WEIGHTS).read_bytes())
    folder = resolve_controlnet(str(file), str(model))
    assert load_file(folder / WEIGHTS).keys() == load_file(published / WEIGHTS).keys()
    # The second time it is there.
    assert resolve_controlnet(str(file), str(model)) == folder


def test_a_file_that_lacks_a_weight(model: Path, published: Path, tmp_path: Path) -> None:
    file = write_original(published, tmp_path / "edges.safetensors")
    tensors = load_file(file)
    del tensors["control_model.zero_convs.1.0.bias"]
    save_file(tensors, file)
    with pytest.raises(HipaError, match=r"edges\.safetensors lacks the weight controlnet_down"):
        resolve_controlnet(str(file), str(model))


def test_a_file_with_a_weight_too_many(model: Path, published: Path, tmp_path: Path) -> None:
    file = write_original(published, tmp_path / "edges.safetensors")
    save_file(load_file(file) | {"control_model.attic.weight": torch.zeros(3)}, file)
    with pytest.raises(HipaError, match=r"edges\.safetensors has \d+ weights, of which \d+"):
        resolve_controlnet(str(file), str(model))


def test_a_file_for_another_model(published: Path, tmp_path: Path) -> None:
    file = write_original(published, tmp_path / "edges.safetensors")
    expected = r"edges\.safetensors does not fit the model: weight .* missing"
    with pytest.raises(HipaError, match=expected):
        resolve_controlnet(str(file), str(MODEL))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_out_channels": [320, 640, 1280, 1280]}, "block_out_channels"),
        ({"cross_attention_dim": 2048}, "cross_attention_dim"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"conditioning_channels": 1}, "1 channels"),
        ({"conditioning_embedding_out_channels": [16, 32]}, "2 times"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"controlnet_conditioning_channel_order": "brg"}, "Expected one of: rgb, bgr"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ],
)
def test_a_configuration_that_does_not_fit(
    published: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    unet = json.loads((published / "config.json").read_text())
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(unet | changes))
    (folder / WEIGHTS).write_bytes((published / WEIGHTS).read_bytes())
    with pytest.raises(HipaError, match=said):
        check_controlnet(folder, unet, 8)


def test_one_that_fits(published: Path) -> None:
    unet = json.loads((published / "config.json").read_text())
    check_controlnet(published, unet, 8)


def test_a_folder_without_weights(published: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    unet = json.loads((published / "config.json").read_text())
    with pytest.raises(HipaError, match="weights"):
        check_controlnet(tmp_path, unet, 8)


@pytest.mark.parametrize("small", [True, False])
def test_those_of_sdxl(tmp_path: Path, small: bool) -> None:
    """The small ones have no attention."""
    model = make_sdxl(tmp_path / "sdxl")
    folder = make_controlnet(model, tmp_path / "edges", small=small)
    unet = json.loads((model / "unet" / "config.json").read_text())
    check_controlnet(folder, unet, 4)
    check_part(ControlNetModel, folder)
    names = load_file(folder / WEIGHTS).keys()
    assert any("attentions" in name for name in names) != small


def test_a_whole_checkpoint_has_the_base_model_beside_it(
    model: Path, published: Path, tmp_path: Path
) -> None:
    """As control_sd15_canny.pth has it, the first that was published."""
    alone = load_file(write_original(published, tmp_path / "alone.safetensors"))
    beside = load_file(write_checkpoint(model, tmp_path / "base.safetensors"))
    file = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {**beside, **alone}}, file)
    folder = resolve_controlnet(str(file), str(model))
    got = load_file(folder / WEIGHTS)
    expected = load_file(published / WEIGHTS)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["controlnet.", "module."])
def test_prefixes_of_other_tools(model: Path, published: Path, tmp_path: Path, prefix: str) -> None:
    file = write_original(published, tmp_path / "edges.safetensors", prefix)
    folder = resolve_controlnet(str(file), str(model))
    assert load_file(folder / WEIGHTS).keys() == load_file(published / WEIGHTS).keys()


@pytest.mark.parametrize(("stem", "pooled"), [("my_shuffle", True), ("canny", False)])
def test_what_a_file_averages_is_in_its_name(
    model: Path, published: Path, tmp_path: Path, stem: str, pooled: bool
) -> None:
    file = write_original(published, tmp_path / f"{stem}.safetensors")
    folder = resolve_controlnet(str(file), str(model))
    config = json.loads((folder / "config.json").read_text())
    assert config["global_pool_conditions"] is pooled


def test_a_file_of_sdxl_in_the_original_layout(tmp_path: Path) -> None:
    model = make_sdxl(tmp_path / "sdxl")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    ControlNetModel.from_unet(unet).save_pretrained(tmp_path / "edges")
    file = write_original(tmp_path / "edges", tmp_path / "edges.safetensors")
    folder = resolve_controlnet(str(file), str(model))
    got = load_file(folder / WEIGHTS)
    expected = load_file(tmp_path / "edges" / WEIGHTS)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_controlnet", "a Control-LoRA"),
        ("difference", "the difference of a ControlNet"),
        ("task_embedding", "union"),
        ("adapter.body.0.in_conv.weight", "a T2I-Adapter"),
    ],
)
def test_other_networks_for_control(model: Path, tmp_path: Path, name: str, said: str) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(3), "input_hint_block.14.weight": torch.zeros(3)}, file)
    with pytest.raises(HipaError, match=said):
        resolve_controlnet(str(file), str(model))


def test_a_controlnet_for_inpainting_is_told_by_its_name(tmp_path: Path) -> None:
    hub = tmp_path / "models--lllyasviel--control_v11p_sd15_inpaint" / "snapshots" / "0123"
    for folder in (hub, tmp_path / "control_v11p_sd15_inpaint"):
        warning = control_warning(folder)
        assert warning is not None
        assert "Masked pixels" in warning
    assert control_warning(tmp_path / "control_v11p_sd15_canny") is None


def test_weights_that_are_not_all_there_are_named_before_loading(
    published: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    tensors = load_file(published / WEIGHTS)
    del tensors["conv_in.bias"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(HipaError, match=r"--controlnet: .* weight conv_in\.bias is missing"):
        check_whole(tmp_path)
