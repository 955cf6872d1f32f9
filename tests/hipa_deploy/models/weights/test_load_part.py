"""Every part is loaded whole, whatever files it lies in, or refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from hipa_deploy.embedded import DECODER
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.models.weights.load_part import ALIGNMENT, load_part
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from tests.original_layout import vae_names
from tests.packaging import (
    STEMS,
    as_bin,
    as_fp16_variant,
    as_shards,
    hub_cache,
    repacked,
    with_old_attention,
)
from tests.tiny_model import make_model
from tests.usual_layout import transformers_takes_peft

KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("load") / "model", attention=True)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """All weights and buffers, in float32, frozen."""
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    got = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    assert not any(weight.data_ptr() % ALIGNMENT for weight in ours.parameters())
    assert not any(weight.requires_grad for weight in ours.parameters())
    assert not ours.training


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("write", [None, as_bin, as_fp16_variant, as_shards, with_old_attention])
def test_it_is_what_the_library_loads(
    model: Path, tmp_path: Path, write: Callable | None, part: str
) -> None:
    folder = model if write is None else repacked(model, tmp_path / "other", write)
    kind = KINDS[part]
    theirs = kind.from_pretrained(
        folder,
        subfolder=part,
        variant="fp16" if write is as_fp16_variant else None,
        use_safetensors=write is not as_bin,
    )
    assert_same(load_part(kind, folder / part), theirs)


def test_a_tiny_decoder_and_links(model: Path, tmp_path: Path) -> None:
    assert_same(load_part(AutoencoderTiny, DECODER), AutoencoderTiny.from_pretrained(DECODER))
    ours = load_part(UNet2DConditionModel, hub_cache(model, tmp_path) / "unet")
    assert_same(ours, load_part(UNet2DConditionModel, model / "unet"))


def test_a_whole_clip_and_fewer_layers(copy: Path) -> None:
    """A folder says "clip skip" by num_hidden_layers; transformers leaves the last layers out."""
    path = copy / "text_encoder/model.safetensors"
    weights = load_file(path)
    beside = {
        "vision_model.post_layernorm.bias": torch.zeros(2),
        "text_projection.weight": torch.zeros(2, 2),
        "logit_scale": torch.zeros(()),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_model.encoder.layers.1.layer_norm1.bias": torch.zeros(16),
    }
    save_file({**weights, **beside}, path)
    theirs = CLIPTextModel.from_pretrained(copy, subfolder="text_encoder")
    assert_same(load_part(CLIPTextModel, copy / "text_encoder"), theirs)
    # A weight inside a layer that is used is another matter.
    save_file({**weights, "text_model.encoder.layers.0.extra.bias": torch.zeros(1)}, path)
    with pytest.raises(HipaError, match=r"no place for weight .*layers\.0\.extra"):
        load_part(CLIPTextModel, copy / "text_encoder")


def change_weights(folder: Path, part: str, change: Callable[[dict], None]) -> None:
    path = folder / part / f"{STEMS[part]}.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


FAULTS: dict[str, tuple[Callable[[dict, str], object], str]] = {
    "missing": (lambda weights, name: weights.pop(name), r"weight \S+ is missing. Copy the model"),
    "unexpected": (
        lambda weights, name: weights.update({f"{name}.more": torch.zeros(1)}),
        r"config.json has no place for weight \S+.more",
    ),
    "shape": (
        lambda weights, name: weights.update({name: torch.zeros(3, 5, 7)}),
        r"weight \S+ has the shape \[3, 5, 7\], and config.json asks for \[",
    ),
    "nan": (
        lambda weights, name: weights[name].view(-1)[-1].fill_(torch.nan),
        r"weight \S+ holds NaN or infinity",
    ),
    "integers": (
        lambda weights, name: weights.update({name: weights[name].int()}),
        r"weight \S+ (holds torch.int32|is stored as I32)\. Expected",
    ),
}


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_training_and_export_refuse_the_same_with_the_same_words(
    copy: Path, fault: str, part: str
) -> None:
    change, message = FAULTS[fault]
    change_weights(copy, part, lambda weights: change(weights, max(weights)))
    with pytest.raises(HipaError, match=message) as in_training:
        DiffusionModel.load(copy, "cpu")
    with pytest.raises(HipaError, match=message) as in_export:
        getattr(ModelParts.open(str(copy)), part)()
    assert str(in_training.value) == str(in_export.value)
    assert "\n" not in str(in_training.value)


def test_a_vae_as_stability_publishes_it_is_told_how_to_convert_it(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file such as vae-ft-mse-840000-ema-pruned.safetensors, put into a diffusers folder."""
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    own = load_part(AutoencoderKL, copy / "vae").state_dict()
    original = {name: value.contiguous() for name, value in vae_names(load_file(path)).items()}
    save_file(original, path)
    with pytest.raises(HipaError, match=r"the names of the original layout, such as") as caught:
        load_part(AutoencoderKL, copy / "vae")

    # The advice leads to the same weights.
    (code,) = re.findall(r"AutoencoderKL\.from_single_file.*", str(caught.value))
    names = {"AutoencoderKL": AutoencoderKL, "FILE": str(path), "FOLDER": str(tmp_path / "vae")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    eval(code.removesuffix("."), names)
    made = load_part(AutoencoderKL, tmp_path / "vae").state_dict()
    torch.testing.assert_close(made, own, rtol=0, atol=0)


@pytest.mark.parametrize("part", KINDS)
def test_weights_of_another_model_are_found_before_an_export_begins(
    copy: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The references of a large UNet take minutes, and its VAE is loaded after them."""
    change_weights(copy, part, lambda weights: weights.pop(max(weights)))

    def late(*_: object, **__: object) -> None:
        pytest.fail("the export has begun")

    monkeypatch.setattr("hipa_deploy.export.export_bundle.write_tokenizer", late)
    options = ExportOptions(model=str(copy), out=copy.parent / "bundle")
    with pytest.raises(HipaError, match=rf"{part}: weight \S+ is missing"):
        export_bundle(options)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_lora_that_was_loaded_and_not_fused(model: Path, tmp_path: Path, part: str) -> None:
    """diffusers saves it in the names of the UNet's weights, transformers in a file of its own."""
    if part == "text_encoder" and not transformers_takes_peft():
        pytest.skip("the installed transformers refuses the installed peft")
    pipe = StableDiffusionPipeline.from_pretrained(model)
    targets = ["to_q"] if part == "unet" else ["q_proj"]
    getattr(pipe, part).add_adapter(LoraConfig(r=2, target_modules=targets))
    pipe.save_pretrained(tmp_path / "saved")
    words = rf"{part} was saved with a LoRA .* not fused\. Call pipe\.fuse_lora\(\) .* --lora\."
    with pytest.raises(HipaError, match=words):
        load_part(KINDS[part], tmp_path / "saved" / part)
    out = tmp_path / "bundle"
    with pytest.raises(HipaError, match=words):
        export_bundle(ExportOptions(model=str(tmp_path / "saved"), out=out))
    assert not out.exists()


def test_several_missing_weights_are_counted(copy: Path) -> None:
    change_weights(
        copy, "unet", lambda weights: [weights.pop(name) for name in sorted(weights)[:3]]
    )
    with pytest.raises(HipaError, match=r"and 2 more are missing"):
        load_part(UNet2DConditionModel, copy / "unet")


@pytest.mark.parametrize("part", KINDS)
def test_a_part_without_weights_is_found_before_any_is_loaded(copy: Path, part: str) -> None:
    shutil.move(copy / part / f"{STEMS[part]}.safetensors", copy / "elsewhere")
    for load in (lambda: DiffusionModel.load(copy, "cpu"), lambda: ModelParts.open(str(copy))):
        with pytest.raises(HipaError, match=f"{part} has no weights"):
            load()
    for path in (copy / part).iterdir():
        if path.name != "config.json":
            path.unlink()
    (copy / part / "config.json").unlink()
    with pytest.raises(HipaError, match=f"no readable {part}/config.json"):
        ModelParts.open(str(copy))


def test_a_damaged_config(copy: Path) -> None:
    config = copy / "unet/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "down_block_types": ["NoSuchBlock"]}))
    with pytest.raises(HipaError, match=r"config\.json cannot be used: "):
        load_part(UNet2DConditionModel, copy / "unet")


class RunsCode:
    """Makes a folder when it is loaded without ``weights_only``."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.proof,)


def test_code_in_a_bin_is_not_run(model: Path, tmp_path: Path) -> None:
    copy = repacked(model, tmp_path / "copy", as_bin)
    proof = tmp_path / "proof"
    torch.save({"a": RunsCode(proof)}, copy / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(HipaError, match=r"holds more than weights: .*That can run code"):
        DiffusionModel.load(copy, "cpu")
    assert not proof.exists()
