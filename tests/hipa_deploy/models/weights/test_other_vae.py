"""Another VAE in a model's place: files as they lie on the web, against diffusers' own reading."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder, unpacked
from hipa_deploy.models.weights import other_vae
from tests.original_layout import vae_names, write_checkpoint
from tests.packaging import hub_cache
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

NAME = "diffusion_pytorch_model.safetensors"
PLACE = "diffusers"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture
def model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def other(model: Path) -> dict[str, torch.Tensor]:
    """The weights of another VAE of the same shapes, by diffusers' names."""
    torch.manual_seed(1)
    weights = load_file(model / "vae" / NAME)
    return {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def original(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in vae_names(weights).items()}


def write(kind: str, weights: dict[str, torch.Tensor], model: Path, folder: Path) -> Path:
    """The VAE as it lies on the web: in a file of some kind, or in a folder."""
    file = folder / "my vae.safetensors"
    if kind == PLACE:
        save_file(weights, file)
    elif kind == "original":
        save_file(original(weights), file)
    elif kind == "with a discriminator":
        beside = {"loss.discriminator.main.0.weight": torch.ones(3)}
        save_file(original(weights) | beside, file)
    elif kind == "prefixed":
        prefixed = {f"first_stage_model.{name}": w for name, w in original(weights).items()}
        save_file(prefixed, file)
    elif kind == "pickled":
        file = file.with_suffix(".pt")
        torch.save({"state_dict": original(weights), "global_step": 3}, file)
    elif kind == "whole checkpoint":
        copy = shutil.copytree(model, folder / "copy")
        save_file(weights, copy / "vae" / NAME)
        write_checkpoint(copy, file)
    else:
        part = folder / "my vae" / ("vae" if kind == "of a model" else "")
        shutil.copytree(model / "vae", part)
        save_file(weights, part / NAME)
        file = folder / "my vae"
    return file


KINDS = (
    *(PLACE, "original", "with a discriminator", "prefixed", "pickled", "whole checkpoint"),
    *("folder", "of a model"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_arrives(
    model: Path, other: dict[str, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    file = write(kind, other, model, tmp_path)
    out = model_folder(str(model), vae=str(file))
    assert out.name == "tiny with my vae"
    assert same(load_file(out / "vae" / NAME), other)
    # All other parts are the model's own, and diffusers takes the folder as any other.
    assert (out / "unet").resolve() == (model / "unet").resolve()
    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert same(dict(pipe.vae.state_dict()), other)
    # Once more it is found, and not made again.
    before = (out / "vae").lstat().st_mtime_ns
    assert unpacked(str(model), vae=str(file)) == str(out)
    assert (out / "vae").lstat().st_mtime_ns == before


def test_half_precision_is_kept_and_decodes_as_diffusers_reads_it(
    model: Path, other: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "half.safetensors"
    save_file({name: weight.half() for name, weight in original(other).items()}, file)
    out = model_folder(str(model), vae=str(file))
    assert {weight.dtype for weight in load_file(out / "vae" / NAME).values()} == {torch.float16}
    expected = AutoencoderKL.from_single_file(str(file), config=str(model / "vae"))
    got = AutoencoderKL.from_pretrained(out / "vae")
    latents = torch.randn(1, got.config.latent_channels, 4, 4)
    assert torch.equal(got.decode(latents).sample, expected.decode(latents).sample)
    assert got.config.scaling_factor == json.loads(
        (model / "vae" / "config.json").read_text(encoding="utf-8")
    ).get("scaling_factor", 0.18215)


def test_a_folder_whose_model_was_moved_is_made_again(
    model: Path, other: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    file = write("original", other, model, tmp_path)
    out = model_folder(str(copy), vae=str(file))
    shutil.move(copy / "unet", copy / "gone")
    shutil.move(copy, tmp_path / "moved")
    assert not (out / "unet").exists()
    shutil.move(tmp_path / "moved" / "gone", tmp_path / "moved" / "unet")
    shutil.move(tmp_path / "moved", copy)
    (out / "vae").unlink()
    (out / "vae").symlink_to(tmp_path / "nowhere")
    assert model_folder(str(copy), vae=str(file)) == out
    assert same(load_file(out / "vae" / NAME), other)


def test_two_at_once_make_one_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    usual = other_vae.new_folder

    @contextmanager
    def at_once(out: Path) -> Iterator[Path]:
        with usual(out) as scratch:
            both.wait(10)
            yield scratch

    monkeypatch.setattr(other_vae, "new_folder", at_once)
    vae = shutil.copytree(model / "vae", tmp_path / "mine")
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(model_folder, str(model), vae=str(vae)) for _ in range(2)]
        first, second = (each.result() for each in made)
    assert first == second
    assert (first / "vae").resolve() == vae


def test_a_folder_that_cannot_be_made_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(OSError, match="no space"):
        model_folder(str(model), vae=str(model / "vae"))
    assert not list((tmp_path / "cache" / "models").glob("*/*"))


def test_a_part_that_is_a_link_is_followed_wherever_it_points(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    first = shutil.move(copy / "unet", tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    (copy / "unet").symlink_to(first)
    vae = str(shutil.copytree(model / "vae", tmp_path / "mine"))
    out = model_folder(str(copy), vae=vae)
    assert (out / "unet").resolve() == first
    (copy / "unet").unlink()
    (copy / "unet").symlink_to(second)
    assert model_folder(str(copy), vae=vae) == out
    assert (out / "unet").resolve() == second


def test_the_parts_are_those_that_the_model_has_now(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    shutil.move(copy / "tokenizer", tmp_path / "tokenizer")
    (copy / "notes.txt").write_text("draft", encoding="utf-8")
    vae = str(shutil.copytree(model / "vae", tmp_path / "mine"))
    out = model_folder(str(copy), vae=vae)
    assert {entry.name for entry in out.iterdir()} == {entry.name for entry in copy.iterdir()}
    shutil.move(tmp_path / "tokenizer", copy / "tokenizer")
    assert model_folder(str(copy), vae=vae) == out
    assert (out / "tokenizer").resolve() == copy / "tokenizer"
    (copy / "notes.txt").unlink()
    # What somebody has put into the cache is no part of the model.
    (out / "text_encoder").unlink()
    (out / "text_encoder").mkdir()
    (out / "text_encoder" / "config.json").write_text("{}", encoding="utf-8")
    (out / "stray").write_text("", encoding="utf-8")
    assert model_folder(str(copy), vae=vae) == out
    assert {entry.name for entry in out.iterdir()} == {entry.name for entry in copy.iterdir()}
    assert (out / "text_encoder").resolve() == copy / "text_encoder"


@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("kind", ["original", "folder"])
def test_a_checkpoint_without_a_vae(
    model: Path, other: dict[str, torch.Tensor], tmp_path: Path, kind: str, is_sdxl: bool
) -> None:
    """As fine-tunes are published: the VAE has a file of its own."""
    source = make_sdxl(tmp_path / "sdxl") if is_sdxl else model
    whole = load_file(write_checkpoint(source, tmp_path / "whole.safetensors"))
    checkpoint = tmp_path / "noVAE.safetensors"
    save_file(
        {n: w for n, w in whole.items() if not n.startswith("first_stage_model.")}, checkpoint
    )
    with pytest.raises(HipaError, match=r"has no vae .*: --vae FILE_OR_FOLDER\."):
        model_folder(str(checkpoint), str(source))

    weights = {
        name: weight + 0.1 * torch.randn_like(weight)
        for name, weight in load_file(source / "vae" / NAME).items()
    }
    file = write(kind, weights, source, tmp_path)
    out = model_folder(str(checkpoint), str(source), str(file))
    assert out.name == "noVAE with my vae"
    assert same(load_file(out / "vae" / NAME), weights)
    unet = load_file(source / "unet" / NAME)
    assert same(load_file(out / "unet" / NAME), unet)
    # diffusers takes the folder as any other.
    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert same(dict(pipe.vae.state_dict()), weights)
    # Without the option the conversion is no model.
    with pytest.raises(HipaError, match="has no vae"):
        model_folder(str(checkpoint), str(source))


def test_a_unet_alone_lacks_more_than_a_vae(model: Path, tmp_path: Path) -> None:
    whole = load_file(write_checkpoint(model, tmp_path / "whole.safetensors"))
    unet = {name: w for name, w in whole.items() if name.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(HipaError, match=r"has no vae .* with all its parts"):
        model_folder(str(tmp_path / "unet.safetensors"), str(model), str(model / "vae"))


def test_a_wrong_file_is_refused_before_the_checkpoint_is_converted(
    model: Path, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(model, tmp_path / "mine.safetensors")
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    wrong = {
        model / "unet" / NAME: "holds no VAE",
        tmp_path / "tiny" / NAME: "tiny autoencoder",
        tmp_path / "tiny": "--decoder",
        model / "unet": "Expected AutoencoderKL",
    }
    for vae, words in wrong.items():
        with pytest.raises(HipaError, match=words):
            model_folder(str(checkpoint), str(model), str(vae))
    assert not (tmp_path / "cache").exists()


def test_the_name_of_a_relative_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model / "vae", tmp_path / "mse" / "vae")
    monkeypatch.chdir(tmp_path / "mse")
    assert model_folder(str(model), vae="vae").name == "tiny with mse"


@pytest.mark.parametrize("part", [".", "vae"])
def test_the_name_of_a_vae_in_the_cache_of_the_hub(model: Path, tmp_path: Path, part: str) -> None:
    """A snapshot's own name is the hash of a commit."""
    shutil.copytree(model / "vae", tmp_path / "mse" / part)
    vae = hub_cache(tmp_path / "mse", tmp_path / "hub")
    assert model_folder(str(model), vae=str(vae)).name == "tiny with name"


def changed(model: Path, folder: Path, **values: object) -> Path:
    """A VAE's folder whose configuration says something else."""
    part = Path(shutil.copytree(model / "vae", folder / "odd"))
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    (part / "config.json").write_text(json.dumps(config | values), encoding="utf-8")
    return part


def test_what_does_not_fit_is_refused(
    model: Path, other: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def refused(vae: Path, words: str) -> None:
        with pytest.raises(HipaError, match=words):
            model_folder(str(model), vae=str(vae))

    refused(tmp_path / "none.safetensors", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config.json")
    refused(model / "unet", "is of 'UNet2DConditionModel'. Expected AutoencoderKL")
    refused(changed(model, tmp_path, scaling_factor=0.13025), "scaling_factor=0.13025")
    shutil.rmtree(tmp_path / "odd")

    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    refused(tmp_path / "tiny", "--decoder")
    refused(tmp_path / "tiny" / NAME, "tiny autoencoder")
    refused(model / "unet" / NAME, "holds no VAE")

    some = original(other)
    del some["decoder.conv_out.weight"]
    save_file(some, tmp_path / "half.safetensors")
    refused(tmp_path / "half.safetensors", r"half.safetensors lacks decoder\.conv_out\.weight\.")
    more = original(other) | {"decoder.more.weight": torch.ones(3)}
    save_file(more, tmp_path / "more.safetensors")
    refused(tmp_path / "more.safetensors", "has .* weights, and the model's VAE has")
    wide = {name: torch.cat([w, w]) for name, w in original(other).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    refused(tmp_path / "wide.safetensors", r"of shape \[16, .*\], and the model's VAE of \[8, ")
    odd = original(other) | {"decoder.mid.attn_1.q.weight": torch.zeros(8, 8, 0, 1)}
    save_file(odd, tmp_path / "odd.safetensors")
    refused(tmp_path / "odd.safetensors", "cannot be converted")
    one_more = other | {"extra.weight": torch.ones(2)}
    save_file(one_more, tmp_path / "extra.safetensors")
    refused(tmp_path / "extra.safetensors", r"/extra.safetensors has extra.weight, for which the")
    (tmp_path / "cut.safetensors").write_bytes((model / "vae" / NAME).read_bytes()[:500])
    refused(tmp_path / "cut.safetensors", "damaged")
    # Nothing of it is left in the cache.
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
def test_a_whole_checkpoint_of_the_other_family_is_refused(
    model: Path, tmp_path: Path, is_sdxl: bool
) -> None:
    """Their VAEs have the same weights; the scaling of the latents would be wrong."""
    sdxl = make_sdxl(tmp_path / "sdxl")
    own, other = (sdxl, model) if is_sdxl else (model, sdxl)
    checkpoint = write_checkpoint(other, tmp_path / "other.safetensors")
    with pytest.raises(HipaError, match=r"is a whole checkpoint of .* for other latents"):
        model_folder(str(own), vae=str(checkpoint))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    own_checkpoint = write_checkpoint(own, tmp_path / "own.safetensors")
    out = model_folder(str(own), vae=str(own_checkpoint))
    assert same(load_file(out / "vae" / NAME), load_file(own / "vae" / NAME))


def test_a_conversion_warns_of_nothing(
    model: Path,
    other: dict[str, torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers does of its own way to change a precision."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model_folder(str(model), vae=str(write("original", other, model, tmp_path)))
    assert caplog.messages == []
