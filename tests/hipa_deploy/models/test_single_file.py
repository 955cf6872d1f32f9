from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder, unpacked
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.single_file import (
    CROSS_ATTENTION,
    FIRST_LAYER,
    PARTS,
    PREDICTION_KEYS,
    SDXL_CROSS_ATTENTION,
    SDXL_PARTS,
    TEXT,
)
from hipa_deploy.models.text_pair import forces_zeros
from tests.original_layout import write_checkpoint
from tests.packaging import hub_cache
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}

INCOMPLETE = r"cannot be converted.*Expected a complete checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("single") / "tiny", "v_prediction")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / part / f"{FILES[part]}.safetensors")


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("vega", [False, True], ids=["sdxl", "vega"])
def test_every_weight_of_an_sdxl_checkpoint_arrives(tmp_path: Path, vega: bool) -> None:
    folder = make_sdxl(tmp_path / "model", vega=vega)
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    out = model_folder(str(checkpoint), str(folder))
    assert ModelConfig.read(out, "generate").has_text_pair
    for part in SDXL_PARTS:
        expected = weights(folder, part)
        got = weights(out, part)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    for name in ("tokenizer", "tokenizer_2"):
        assert (out / name / "vocab.json").is_file()


def test_a_folder_of_the_other_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    sdxl = make_sdxl(tmp_path / "model")
    checkpoint = write_checkpoint(sdxl, tmp_path / "mine.safetensors")
    with pytest.raises(HipaError, match="has one text encoder, and the checkpoint two"):
        model_folder(str(checkpoint), str(folder))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"in_channels": 9}, r"takes 4 channels.* that of --config .* takes 9 channels"),
        ({"cross_attention_dim": 32}, r"text contexts that are 16 wide, .* that are 32 wide\."),
    ],
)
def test_a_folder_of_another_unet_is_refused_before_the_conversion(
    folder: Path, tmp_path: Path, cache: Path, values: dict[str, int], words: str
) -> None:
    """diffusers' own words are of options that no command has."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    text = other / "text_encoder/config.json"
    width = json.loads(path.read_text())["cross_attention_dim"]
    text.write_text(json.dumps(json.loads(text.read_text()) | {"hidden_size": width}))
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    with pytest.raises(HipaError, match=words + r".*: --config FOLDER\."):
        model_folder(str(checkpoint), str(other))
    assert not cache.exists()


def test_an_inpainting_checkpoint_with_a_folder_of_a_plain_model(
    folder: Path, tmp_path: Path
) -> None:
    stored = load_file(write_checkpoint(folder, tmp_path / "mine.safetensors"))
    first = stored[FIRST_LAYER]
    stored[FIRST_LAYER] = torch.cat([first, first, first[:, :1]], dim=1)
    stored[CROSS_ATTENTION] = torch.zeros(16, 768)
    save_file(stored, tmp_path / "mine.safetensors")
    with pytest.raises(HipaError, match=r"--config sd15-inpainting or --config FOLDER\."):
        model_folder(str(tmp_path / "mine.safetensors"), str(folder))


def test_what_guidance_leads_away_from_is_the_folders(tmp_path: Path) -> None:
    folder = make_sdxl(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    for forces in (False, True):
        index["force_zeros_for_empty_prompt"] = forces
        (folder / "model_index.json").write_text(json.dumps(index))
        checkpoint = write_checkpoint(folder, tmp_path / f"{forces}.safetensors")
        assert forces_zeros(model_folder(str(checkpoint), str(folder))) is forces


def said_to_predict(
    path: Path, what: str, tensors: dict[str, torch.Tensor], key: str = PREDICTION_KEYS[0]
) -> Path:
    save_file(tensors, path, metadata={key: what})
    return path


@pytest.mark.parametrize("key", PREDICTION_KEYS)
def test_what_the_header_says_of_the_prediction(folder: Path, tmp_path: Path, key: str) -> None:
    stored = load_file(write_checkpoint(folder, tmp_path / "plain.safetensors"))
    for what in ("v", "v_prediction", "something new"):
        said = said_to_predict(tmp_path / f"{what}.safetensors", what, stored, key)
        assert same_weights(folder, model_folder(str(said), str(folder)))
    wrong = said_to_predict(tmp_path / "eps.safetensors", "epsilon", stored, key)
    with pytest.raises(HipaError, match=rf"predicts epsilon \({key}\), .* predicts v_prediction"):
        model_folder(str(wrong), str(folder))

    # The two models of SD 2.x look alike but for this.
    shapes = {**SD, CROSS_ATTENTION: (8, 1024)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for what, wrong_config in (("v", "sd21-base"), ("epsilon", "sd21-v")):
        said = said_to_predict(tmp_path / f"2-{what}.safetensors", what, tensors, key)
        with pytest.raises(HipaError, match=f"says that it predicts .*, and {wrong_config}"):
            model_folder(str(said), wrong_config)
        with pytest.raises(HipaError, match="cannot be converted"):
            model_folder(str(said))


def test_a_marked_checkpoint_of_sd2(tmp_path: Path) -> None:
    """ComfyUI marks every model that predicts v, and one of SD 2.1's does."""
    shapes = {**SD, CROSS_ATTENTION: (8, 1024), "v_pred": (0,)}
    marked = write(tmp_path / "marked.safetensors", shapes)
    for config in (None, "sd21-v"):
        with pytest.raises(HipaError, match=r"cannot be converted: .* of sd21-v\."):
            model_folder(str(marked), config)
    with pytest.raises(HipaError, match=r"has the mark v_pred: .* --config sd21-v\."):
        model_folder(str(marked), "sd21-base")
    marked = write(tmp_path / "marked.safetensors", {**shapes, "ztsnr": (0,)})
    with pytest.raises(HipaError, match=r"has the mark v_pred: .* --config FOLDER\."):
        model_folder(str(marked), "sd21-v")


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_mark_and_another_scheduler(tmp_path: Path, name: str) -> None:
    folder = make_sdxl(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", name]})
    )
    stored = load_file(write_checkpoint(folder, tmp_path / "plain.safetensors"))
    marked = tmp_path / "marked.safetensors"
    save_file({**stored, "v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, marked)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    right = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    right["_class_name"] = name
    for key, wrong in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False)):
        values = {**json.loads(scheduler.read_text()), **right, key: wrong}
        scheduler.write_text(json.dumps(values))
        with pytest.raises(HipaError, match=rf"has the mark .* has {key}={wrong!r}\. Expected "):
            model_folder(str(marked), str(folder))
    scheduler.write_text(json.dumps({**values, **right}))
    assert (
        ModelConfig.read(model_folder(str(marked), str(folder))).scheduler.items() >= right.items()
    )

    save_file({**stored, "edm_vpred.sigma_max": torch.ones(1)}, marked)
    for config in (None, str(folder)):
        with pytest.raises(HipaError, match="was made for EDM's noise schedule"):
            model_folder(str(marked), config)


@pytest.mark.parametrize("open_clip", [False, True], ids=["sd1", "sd2"])
def test_every_weight_of_the_checkpoint_arrives(
    folder: Path, tmp_path: Path, open_clip: bool
) -> None:
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors", open_clip=open_clip)
    out = model_folder(str(checkpoint), str(folder))
    assert out.name == "mine"
    for part in PARTS:
        expected = weights(folder, part)
        got = weights(out, part)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    vocabulary = Path("tokenizer", "vocab.json")
    assert (out / vocabulary).read_text() == (folder / vocabulary).read_text()
    assert "v_prediction" in (out / "scheduler" / "scheduler_config.json").read_text()


def test_it_is_converted_once_and_found_by_its_content(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    out = model_folder(str(checkpoint), str(folder))
    stamp = (out / "model_index.json").stat().st_mtime_ns
    moved = tmp_path / "elsewhere" / "mine.safetensors"
    moved.parent.mkdir()
    shutil.copy(checkpoint, moved)
    assert model_folder(str(moved), str(folder)) == out
    assert (out / "model_index.json").stat().st_mtime_ns == stamp
    other = {name: w + 1 for name, w in load_file(checkpoint).items()}
    save_file(other, moved)
    assert model_folder(str(moved), str(folder)) != out


def test_what_a_vae_s_training_left_in_its_file(folder: Path, tmp_path: Path) -> None:
    """vae-ft-mse-840000 has its averaging's state, and tools put all of a VAE into a checkpoint."""
    stored = load_file(write_checkpoint(folder, tmp_path / "plain.safetensors"))
    vae = PARTS["vae"]
    stored[f"{vae}model_ema.decay"] = torch.tensor(0.9999)
    stored[f"{vae}model_ema.num_updates"] = torch.tensor(840_000)
    stored[f"{vae}loss.logvar"] = torch.zeros(())
    save_file(stored, tmp_path / "baked.safetensors")
    assert same_weights(folder, model_folder(str(tmp_path / "baked.safetensors"), str(folder)))
    save_file({**stored, f"{vae}more.weight": torch.zeros(7)}, tmp_path / "more.safetensors")
    with pytest.raises(HipaError, match=r"its vae has [\d,]+ weights, and that of"):
        model_folder(str(tmp_path / "more.safetensors"), str(folder))


def test_a_name_with_square_brackets_is_shown(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    checkpoint = write_checkpoint(folder, tmp_path / "mine [v5.1].safetensors")
    assert model_folder(str(checkpoint), str(folder)).name == "mine [v5.1]"
    assert "mine [v5.1].safetensors" in capsys.readouterr().err


def test_each_part_keeps_its_precision(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    stored = load_file(checkpoint)
    for name, weight in stored.items():
        if name.startswith(PARTS["unet"]):
            stored[name] = weight.half()
    save_file(stored, checkpoint)
    out = model_folder(str(checkpoint), str(folder))
    assert {w.dtype for w in weights(out, "unet").values()} == {torch.float16}
    assert {w.dtype for w in weights(out, "vae").values()} == {torch.float32}


def same_weights(folder: Path, out: Path) -> bool:
    for part in PARTS:
        expected = weights(folder, part)
        got = weights(out, part)
        assert expected.keys() == got.keys()
        if not all(torch.equal(expected[name], got[name]) for name in expected):
            return False
    return True


def with_old_names(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As checkpoints of transformers before 4.0 name the text encoder, with its position numbers.

    Among others diffusers' own conversion script wrote them so.
    """
    stored = {name.replace(f"{TEXT}text_model.", TEXT): w for name, w in stored.items()}
    return {**stored, f"{TEXT}embeddings.position_ids": torch.arange(77)[None]}


def with_averages(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With an averaged copy of the UNet beside it, as v1-5-pruned has it, of other values."""
    unet = PARTS["unet"]
    averages = {}
    for name, weight in stored.items():
        if name.startswith(unet):
            flat = name.removeprefix("model.").replace(".", "")
            averages[f"model_ema.{flat}"] = weight + 1
    return {**stored, **averages, "model_ema.decay": torch.tensor(0.9999)}


@pytest.mark.parametrize("change", [with_old_names, with_averages])
@pytest.mark.parametrize("ending", [".safetensors", ".SafeTensors", ".ckpt", ".CKPT", ".pt"])
def test_every_naming_and_every_file_gives_the_same_weights(
    folder: Path, tmp_path: Path, change: Callable, ending: str
) -> None:
    stored = change(load_file(write_checkpoint(folder, tmp_path / "plain.safetensors")))
    checkpoint = tmp_path / f"mine{ending}"
    if "safe" in ending.lower():
        save_file(stored, checkpoint)
    else:
        # As pytorch_lightning writes it: the weights beside the state of the training.
        torch.save({"global_step": 7, "state_dict": stored}, checkpoint)
    out = model_folder(str(checkpoint), str(folder))
    assert out.name == "mine"
    assert same_weights(folder, out)
    assert not list(out.glob("checkpoint*"))


def test_two_names_of_one_weight(folder: Path, tmp_path: Path) -> None:
    """A merge of checkpoints with the old and the current names has both text encoders."""
    stored = load_file(write_checkpoint(folder, tmp_path / "plain.safetensors"))
    positions = f"{TEXT}text_model.embeddings.position_ids"
    stored[positions] = torch.arange(77)[None]
    twice = tmp_path / "positions.safetensors"
    save_file({**stored, f"{TEXT}embeddings.position_ids": torch.arange(77)[None]}, twice)
    assert same_weights(folder, model_folder(str(twice), str(folder)))

    other = {name: weight + 1 for name, weight in stored.items() if name.startswith(TEXT)}
    merged = tmp_path / "merged.safetensors"
    save_file({**stored, **with_old_names(other)}, merged)
    with pytest.raises(HipaError, match="has two tensors of one weight, cond_stage_model"):
        model_folder(str(merged), str(folder))


def test_weights_that_share_memory(folder: Path, tmp_path: Path) -> None:
    """Pickled, parts of one tensor stay parts of it; a .safetensors file cannot say that."""
    stored = load_file(write_checkpoint(folder, tmp_path / "plain.safetensors"))
    names = [name for name in stored if name.endswith(".weight")][:2]
    whole = torch.cat([stored[name].flatten() for name in names])
    start = 0
    for name in names:
        shape = stored[name].shape
        stored[name] = whole[start : start + shape.numel()].view(shape)
        start += shape.numel()
    norms = [f"{TEXT}text_model.encoder.layers.0.layer_norm{i}.weight" for i in (1, 2)]
    assert torch.equal(*(stored[name] for name in norms))
    stored[norms[0]] = stored[norms[1]]
    torch.save(stored, tmp_path / "mine.ckpt")
    assert same_weights(folder, model_folder(str(tmp_path / "mine.ckpt"), str(folder)))


class RunsCode:
    """Writes a file when it is loaded without ``weights_only``."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_code_in_a_file_is_named_and_never_run(folder: Path, tmp_path: Path, ending: str) -> None:
    proof = tmp_path / "proof"
    checkpoint = tmp_path / f"mine{ending}"
    torch.save({"state_dict": {FIRST_LAYER: torch.zeros(1), "x": RunsCode(proof)}}, checkpoint)
    with pytest.raises(HipaError, match=r"more than weights: \w+.mkdir. That can run") as error:
        model_folder(str(checkpoint), str(folder))
    assert "\n" not in str(error.value)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"step": 7}, torch.zeros(2)])
def test_a_pickled_file_without_names(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(HipaError, match="holds no weights by name"):
        model_folder(str(tmp_path / "mine.pt"))


def test_two_processes_convert_one_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second takes the first's result, whenever the first is ready."""
    from diffusers import UNet2DConditionModel

    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    save = UNet2DConditionModel.save_pretrained
    outs = []

    def save_late(self: UNet2DConditionModel, path: Path) -> None:
        monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", save)
        outs.append(model_folder(str(checkpoint), str(folder)))
        (outs[0] / "winner").touch()
        self.save_pretrained(path)

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", save_late)
    out = model_folder(str(checkpoint), str(folder))
    assert outs == [out]
    assert (out / "winner").exists()
    assert same_weights(folder, out)
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_a_configuration_with_fewer_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    """diffusers would leave the other layers out, with a warning."""
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    stored = load_file(checkpoint)
    extra = {
        name.replace("output_blocks.3", "output_blocks.4"): weight + 1
        for name, weight in stored.items()
        if "output_blocks.3." in name
    }
    save_file({**stored, **extra}, checkpoint)
    with pytest.raises(HipaError, match=r"its unet has [\d,]+ weights, and that of .* --config"):
        model_folder(str(checkpoint), str(folder))


# Of each layout: how its names begin, what tools store beside the text encoder, and what is more.
TEXTS = {
    "sd1": (
        "cond_stage_model.",
        (
            "logit_scale",
            "transformer.logit_scale",
            "transformer.text_projection.weight",
            "transformer.text_model.embeddings.position_ids",
            "transformer.vision_model.encoder.layers.0.mlp.fc1.bias",
        ),
        "transformer.text_model.encoder.layers.0.self_attn.q_proj.adapter",
    ),
    "sd2": (
        "cond_stage_model.model.",
        ("logit_scale", "text_projection", "attn_mask", "transformer.resblocks.23.ln_1.bias"),
        "transformer.resblocks.0.attn.adapter",
    ),
    "sdxl, first": (
        "conditioner.embedders.0.",
        (
            "logit_scale",
            "transformer.text_projection.weight",
            "transformer.text_model.embeddings.position_ids",
        ),
        "adapter",
    ),
    "sdxl, second": (
        "conditioner.embedders.1.model.",
        ("logit_scale", "attn_mask"),
        "transformer.resblocks.0.attn.adapter",
    ),
}


@pytest.mark.parametrize("layout", TEXTS)
def test_more_than_a_text_encoder_has(folder: Path, tmp_path: Path, layout: str) -> None:
    """diffusers would leave it out, with a warning; what is known to be of no use may be there."""
    prefix, beside, more = TEXTS[layout]
    source = make_sdxl(tmp_path / "model") if "sdxl" in layout else folder
    plain = write_checkpoint(source, tmp_path / "plain.safetensors", open_clip=layout == "sd2")
    stored = load_file(plain)
    stored |= {prefix + name: torch.ones(3) for name in beside}
    if layout == "sd2":
        width = len(stored[f"{prefix}ln_final.bias"])
        stored[f"{prefix}text_projection"] = torch.ones(width, width)
    known = tmp_path / "known.safetensors"
    save_file(stored, known)
    out = model_folder(str(known), str(source))
    expected = weights(source, "text_encoder")
    got = weights(out, "text_encoder")
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    save_file({**stored, prefix + more: torch.ones(3)}, known)
    with pytest.raises(HipaError, match=r"its text_encoder\w* has [\d,]+ weights, and that of"):
        model_folder(str(known), str(source))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "incomplete: weight .*final_layer_norm.bias",
        ),
        ("model.diffusion_model.out.2.bias", INCOMPLETE),
        ("first_stage_model.decoder.conv_in.weight", INCOMPLETE),
    ],
)
def test_a_weight_that_is_missing_and_nothing_is_kept(
    folder: Path, tmp_path: Path, cache: Path, weight: str, message: str
) -> None:
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    stored = load_file(checkpoint)
    del stored[weight]
    save_file(stored, checkpoint)
    with pytest.raises(HipaError, match=message):
        model_folder(str(checkpoint), str(folder))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_full_disk_is_found_before_the_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = load_file(write_checkpoint(folder, tmp_path / "mine.safetensors"))
    save_file(with_averages(stored), tmp_path / "mine.safetensors")
    size = sum(weight.nbytes for weight in stored.values())
    out = model_folder(str(tmp_path / "mine.safetensors"), str(folder))
    monkeypatch.setattr("hipa_deploy.disk.files.free_bytes", lambda _: size // 2)
    # What was converted before needs no space.
    assert model_folder(str(tmp_path / "mine.safetensors"), str(folder)) == out
    shutil.rmtree(out)

    def late(*_: object) -> None:
        pytest.fail("the conversion has begun")

    monkeypatch.setattr("hipa_deploy.models.single_file._convert", late)
    with pytest.raises(HipaError, match=r"free on its disk.* HIPA_CACHE sets another folder"):
        model_folder(str(tmp_path / "mine.safetensors"), str(folder))
    # The averaged copy is not written, so it needs none.
    monkeypatch.setattr("hipa_deploy.disk.files.free_bytes", lambda _: size * 5 // 4)
    with pytest.raises(pytest.fail.Exception, match="the conversion has begun"):
        model_folder(str(tmp_path / "mine.safetensors"), str(folder))


def test_a_cache_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    def full(self: object, path: Path) -> None:
        raise OSError("No space left on device")

    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full)
    with pytest.raises(HipaError, match=r"cannot be written: the disk is full"):
        model_folder(str(checkpoint), str(folder))


def test_a_config_of_other_shapes_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    stored = load_file(checkpoint)
    stored[FIRST_LAYER] = torch.zeros(32, 4, 3, 3)
    save_file(stored, checkpoint)
    with pytest.raises(HipaError, match="cannot be converted"):
        model_folder(str(checkpoint), str(folder))


SDXL = {FIRST_LAYER: (8, 4, 3, 3), "first_stage_model.x": (1,)}
PAIR = {
    "conditioner.embedders.0.transformer.x": (1,),
    "conditioner.embedders.1.model.x": (1,),
}
SD = {FIRST_LAYER: (8, 4, 3, 3), "first_stage_model.x": (1,), "cond_stage_model.x": (1,)}


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        (
            {"conditioner.embedders.0.model.ln_final.bias": (4,)},
            None,
            "is SDXL's refiner, which finishes images of another model",
        ),
        (
            {**SDXL, "conditioner.embedders.0.transformer.x": (1,)},
            None,
            "has no text_encoder_2",
        ),
        (
            {**SDXL, **PAIR, SDXL_CROSS_ATTENTION: (8, 2048)},
            None,
            r"2048 wide, its UNet has 1 transformers\. Name the model",
        ),
        ({**SDXL, **PAIR, "v_pred": (1,)}, None, "has the mark v_pred: it does not predict eps"),
        (
            {**SD, "cond_stage_model.transformer.x.scale_weight": (1,)},
            None,
            r"float8 with scales of their own \(cond_stage_model.*which are not read",
        ),
        ({"unet.to_q.lora_A.weight": (4, 4)}, None, "holds LoRA weights"),
        ({"double_blocks.0.weight": (4, 4)}, None, f"has no weight {FIRST_LAYER}"),
        ({**SD, FIRST_LAYER: (8, 8, 3, 3)}, None, r"takes 8 channels \(made for editing"),
        (
            {**SD, FIRST_LAYER: (8, 9, 3, 3), CROSS_ATTENTION: (8, 768)},
            "sd15",
            r"takes 9 channels, unlike sd15's. Expected --config sd15-inpainting",
        ),
        ({FIRST_LAYER: (8, 4, 3, 3), "cond_stage_model.x": (1,)}, None, "has no vae"),
        ({FIRST_LAYER: (8, 4, 3, 3), "first_stage_model.x": (1,)}, None, "has no text_encoder"),
        (
            {**SD, CROSS_ATTENTION: (8, 1024)},
            None,
            "Say which it is: --config sd21-base or --config sd21-v",
        ),
        (
            {**SD, CROSS_ATTENTION: (8, 768)},
            "sd21-v",
            r"768 wide, unlike sd21-v's. Expected --config sd15",
        ),
        ({**SD, CROSS_ATTENTION: (8, 640)}, None, r"640 wide\. Name the model .* --config FOLDER"),
        (SD, None, "no text contexts where SD 1.x, 2.x and SDXL have them.*--config FOLDER"),
        (
            SD,
            "sd3",
            "--config sd3 is not a diffusers folder. "
            "Expected one with a tokenizer, or: sd15, sd21-base, sd21-v, sd15-inpainting",
        ),
    ],
)
def test_wrong_kinds_are_refused(
    tmp_path: Path, shapes: dict, config: str | None, message: str
) -> None:
    checkpoint = write(tmp_path / "x.safetensors", shapes)
    with pytest.raises(HipaError, match=message) as error:
        model_folder(str(checkpoint), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.ckpt", b"pickle", "is damaged: torch cannot read it as weights"),
        ("x.ckpt", b"", "is damaged: torch cannot read it as weights"),
        ("x.safetensors", b"1234", "is damaged"),
        ("x.safetensors", b"", "is damaged"),
        (
            "x.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer, not the weights. Run in that folder: git lfs pull",
        ),
        ("x.gguf", b"GGUF", "is a .gguf file. Expected weights in a file that ends in .safetens"),
        ("weights", b"1234", "is a nameless file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HipaError, match=message):
        model_folder(str(tmp_path / name))


@pytest.mark.parametrize("resolve", [model_folder, unpacked])
def test_a_config_is_for_one_file(folder: Path, resolve: Callable) -> None:
    with pytest.raises(HipaError, match="--config is for a checkpoint in one file"):
        resolve(str(folder), "sd15")
    assert str(resolve(str(folder))) == str(folder)


def test_configurations_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    hub_cache(folder, tmp_path)
    out = model_folder(str(checkpoint), str(tmp_path / "models--owner--name"))
    assert same_weights(folder, out)


def test_a_checkpoint_made_for_inpainting(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "inpainting", in_channels=9)
    checkpoint = write_checkpoint(folder, tmp_path / "mine.safetensors")
    out = model_folder(str(checkpoint), str(folder))
    assert same_weights(folder, out)
    assert ModelConfig.read(out, "inpaint").is_inpainting
