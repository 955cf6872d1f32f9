"""The folder of a published adaptor: what loads it, its card, and what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from hipa_deploy.embedded import ADAPTORS, MODEL
from hipa_deploy.errors import HipaError, HipaWarning
from hipa_deploy.export.merge import merge_adaptor
from hipa_deploy.models.adaptor_folder import METADATA
from hipa_deploy.publish.base_model import check_hub_id
from hipa_deploy.publish.folders import Wishes, open_publication
from tests.original_layout import write_checkpoint

from .conftest import PNG, front_matter, written

pytestmark = pytest.mark.filterwarnings("ignore::hipa_deploy.errors.HipaWarning")


@torch.no_grad()
def output_of(unet: Callable[..., tuple[Tensor]]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample_BCHW = torch.randn(1, 4, 16, 16, generator=generator)
    context_BLD = torch.randn(1, 77, 192, generator=generator)
    return unet(sample_BCHW, 999, context_BLD, return_dict=False)[0]


def test_peft_diffusers_and_our_merge_load_the_same_adaptor(tmp_path: Path) -> None:
    folder = written("emoji", tmp_path / "out")
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    base_BCHW = output_of(pipe.unet)
    pipe.load_lora_weights(folder)
    expected_BCHW = output_of(pipe.unet)
    assert (expected_BCHW - base_BCHW).abs().max() > 0.01

    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet")
    torch.testing.assert_close(
        output_of(PeftModel.from_pretrained(unet, folder)), expected_BCHW, rtol=0, atol=0
    )
    merged = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet")
    merge_adaptor(merged, folder, 1.0)
    torch.testing.assert_close(output_of(merged), expected_BCHW, rtol=0, atol=1e-4)


def test_the_card_of_an_adaptor(adaptor: Path, model_with_licence: Path, tmp_path: Path) -> None:
    out = written(
        adaptor, tmp_path / "out", model=str(model_with_licence), base_model="stabilityai/base"
    )
    assert front_matter(out) == {
        "base_model": "stabilityai/base",
        "base_model_relation": "adapter",
        "inference": {"parameters": {"num_inference_steps": 1, "guidance_scale": 0}},
        "library_name": "diffusers",
        "license": "openrail++",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "one-step", "hipa"],
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "stabilityai/base"
    text = (out / "README.md").read_text()
    for expected in (
        'pipe.load_lora_weights("me/one-step"',
        'PeftModel.from_pretrained(unet, "me/one-step")',
        "hipa-export --model stabilityai/base --adaptor my-adaptor",
        "| trained weights | 2,323,456 |",
        "| teacher's images | 2,048, 30 UNet evaluations each |",
        "None was measured for this card.",
    ):
        assert expected in text


def test_the_card_says_on_what_and_how_long_it_was_trained(adaptor: Path, tmp_path: Path) -> None:
    path = adaptor / METADATA
    older = {**json.loads(path.read_text()), "training": []}
    path.write_text(json.dumps(older))
    assert "| hours and device | not recorded |" in card(adaptor, tmp_path / "before")
    gpu = {"device": "cuda", "card": "NVIDIA A100", "processes": 4, "hours": 2.5, "steps": 900}
    cpu = {"device": "cpu", "card": "AMD EPYC", "processes": 1, "hours": 0.05, "steps": 100}
    path.write_text(json.dumps(older | {"training": [gpu, cpu]}))
    expected = "2.5 h on 4 x NVIDIA A100 (cuda), 900 steps; 3.0 min on AMD EPYC (cpu), 100 steps"
    expected += ", of this training alone"  # it started from another adaptor
    assert f"| hours and device | {expected} |" in card(adaptor, tmp_path / "after")


def test_a_card_says_from_which_adaptor_a_training_started(adaptor: Path, tmp_path: Path) -> None:
    change(adaptor, initial_sha256="a" * 64, earlier_prompts_sha256=["b" * 64, "c" * 64])
    text = card(adaptor, tmp_path / "out")
    assert f"| started from | an adaptor, SHA-256 of its weights `{'a' * 64}`, trained" in text
    assert "before on 2 sets of prompts |" in text
    change(adaptor, earlier_prompts_sha256=[])
    assert "before on prompts that were not recorded |" in card(adaptor, tmp_path / "older")
    assert re.search(r"\| optimiser steps \| [\d,]+, of this training alone \|", text)
    change(adaptor, initial_sha256=None, earlier_prompts_sha256=[])
    scratch = card(adaptor, tmp_path / "scratch")
    assert "started from" not in scratch
    assert "of this training alone" not in scratch


def test_a_card_of_an_average_says_so(adaptor: Path, tmp_path: Path) -> None:
    recipe = json.loads((adaptor / METADATA).read_text())["recipe"]
    average = {"adaptors": ["a" * 64, "b" * 64], "rank": 8, "left_out": 0.131}
    change(adaptor, recipe=recipe | {"average": average}, initial_sha256=None)
    text = card(adaptor, tmp_path / "out")
    hashes = f"`{'a' * 64}`, `{'b' * 64}`"
    assert f"| average of | 2 adaptors, SHA-256 of their weights {hashes} |" in text
    assert "| left out by its rank | 13.1% of the average's norm |" in text
    assert "recipe [teacher], of the first adaptor" in text
    for other in ("optimiser steps", "images seen", "teacher's images", "trained weights"):
        assert f"| {other} |" not in text


def test_the_card_of_the_included_adaptor_says_what_it_is_the_average_of(tmp_path: Path) -> None:
    with pytest.warns(HipaWarning):
        out = written("emoji", tmp_path / "out")
    text = (out / "README.md").read_text()
    assert "| average of | 5 adaptors, SHA-256 of their weights " in text
    assert "| left out by its rank | 0.2% of the average's norm |" in text
    assert "| folder of images, of the first adaptor | pictures4k |" in text


def test_an_average_that_left_out_nothing_is_one(adaptor: Path, tmp_path: Path) -> None:
    """A program that writes JSON anew may make 0 of 0.0."""
    recipe = json.loads((adaptor / METADATA).read_text())["recipe"]
    average = {"adaptors": ["a" * 64, "b" * 64], "rank": 8, "left_out": 0}
    change(adaptor, recipe=recipe | {"average": average}, initial_sha256=None)
    assert "| left out by its rank | 0.0% of the average's norm |" in card(adaptor, tmp_path / "o")


def test_a_recipe_without_its_numbers_has_a_card(adaptor: Path, tmp_path: Path) -> None:
    recipe = json.loads((adaptor / METADATA).read_text())["recipe"]
    teacher = recipe["teacher"] | {"pairs": 60, "steps": 5, "guidance": 1.0}
    loss = {"perceptual": "none", "hf_weight": None, "latent_weight": 0.0}
    score = {"teacher": teacher, "loss": loss, "score": {"weight": 1.0}, "samples": None}
    change(adaptor, recipe=recipe | score)
    assert "| teacher's images | 60, 5 UNet" in card(adaptor, tmp_path / "samples")
    change(adaptor, recipe=recipe | {"teacher": teacher | {"steps": None}})
    assert "| teacher's images |" not in card(adaptor, tmp_path / "steps")
    source = {"images": None, "per_image": None}
    edit = recipe | {"teacher": teacher, "source": source}
    change(adaptor, task="edit", strengths=[1.0], recipe=edit)
    assert "| teacher's edits | 60, at most" in card(adaptor, tmp_path / "edit")


def test_a_card_names_no_folder_of_the_one_who_trained(adaptor: Path, tmp_path: Path) -> None:
    recipe = json.loads((adaptor / METADATA).read_text())["recipe"]
    source = {"images": "../acme/photos/", "prompts": "acme\\edits.txt"}
    more = {"prompts": "../acme/words.txt", "source": source}
    more["latent_discriminator"] = {"weight": 1.0, "real_images": "../acme/real"}
    change(adaptor, task="edit", strengths=[1.0], recipe=recipe | more)
    text = card(adaptor, tmp_path / "out")
    assert "| folder of images | photos |" in text
    assert "| recipe [source] | images = photos, prompts = edits.txt |" in text
    assert "real_images = real |" in text
    assert "| prompts | words.txt (SHA-256" in text
    assert "acme" not in text


def test_a_card_names_the_data_that_were_used(adaptor: Path, tmp_path: Path) -> None:
    recipe = json.loads((adaptor / METADATA).read_text())["recipe"]
    teacher = recipe["teacher"] | {"pairs": 60, "steps": 5, "guidance": 1.0}
    source = {"images": "photos", "per_image": 4}
    change(adaptor, task="upscale", recipe=recipe | {"teacher": teacher, "source": source})
    text = card(adaptor, tmp_path / "folder")
    assert "| folder of images | photos |" in text
    assert "| recipe [source] | images = photos, per_image = 4 |" in text
    assert "| prompts |" not in text
    assert "| teacher's images |" not in text

    source = {"images": None, "per_image": 4}
    edit = recipe | {"teacher": teacher, "source": source}
    change(adaptor, task="edit", strengths=[1.0], recipe=edit)
    text = card(adaptor, tmp_path / "edit")
    assert "| teacher's images | 60, 5 UNet evaluations each |" in text
    assert "| teacher's edits | 240, at most 5 UNet evaluations each |" in text

    source = {"images": "photos", "per_image": 2}
    pictures = recipe | {"teacher": teacher, "source": source}
    change(adaptor, task="generate", strengths=[], recipe=pictures)
    text = card(adaptor, tmp_path / "pictures")
    assert "| folder of images | photos |" in text
    assert "| prompts | " in text
    assert "| teacher's images | 60, 5 UNet evaluations each |" in text
    assert "| teacher's edits | 2 of each image, at most 5 UNet evaluations each |" in text

    loss = {"perceptual": "none", "hf_weight": 0.0, "latent_weight": 0.0}
    score = {"teacher": teacher, "loss": loss, "score": {"weight": 1.0}, "samples": 1}
    alone = {**recipe, **score, "latent_discriminator": {"weight": 0.0}}
    change(adaptor, task="generate", strengths=[], recipe=alone)
    text = card(adaptor, tmp_path / "score")
    assert "| teacher's images | 1, 5 UNet evaluations each |" in text


def card(adaptor: Path, out: Path) -> str:
    """The card's text."""
    with pytest.warns(HipaWarning):
        written(adaptor, out)
    return (out / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in ADAPTORS if name != "emoji"])
def test_a_task_is_not_promised_to_diffusers(name: str, tmp_path: Path) -> None:
    out = written(name, tmp_path / "out")
    assert front_matter(out)["pipeline_tag"] == "image-to-image"
    text = (out / "README.md").read_text()
    assert "from diffusers import DDIM" not in text
    assert f"hipa-{name.removeprefix('emoji-')} my-bundle" in text


def test_only_what_belongs_to_an_adaptor_is_published(adaptor: Path, tmp_path: Path) -> None:
    (adaptor / "checkpoint").mkdir()
    (adaptor / "checkpoint" / "state.pt").write_bytes(b"x")
    (adaptor / "notes.txt").write_text("mine")
    out = written(adaptor, tmp_path / "out")
    assert {path.name for path in out.rglob("*") if path.is_file()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "hipa_adaptor.json",
        "pytorch_lora_weights.safetensors",
        "scheduler_config.json",
    }


def test_the_report_is_in_the_card(report: Path, tmp_path: Path) -> None:
    out = written("emoji", tmp_path / "out", reports=(report,))
    text = (out / "README.md").read_text()
    assert "| HiPA | 0.1 |" in text
    assert "![Samples](quality/samples.png)" in text
    assert (out / "quality" / "samples.png").read_bytes() == PNG


def test_a_report_of_another_adaptor_is_refused(report: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="measured something else"):
        written("emoji-edit", tmp_path / "out", reports=(report,))


def test_an_old_report_gets_a_warning(report: Path, tmp_path: Path) -> None:
    (report / "report.json").write_text('{"rows": {}}')
    with pytest.warns(HipaWarning, match="does not say which adaptor"):
        written("emoji", tmp_path / "out", reports=(report,))


def test_a_report_of_no_adaptor_is_refused(report: Path, tmp_path: Path) -> None:
    """It was measured with --adaptor none, which another one's card must not hide."""
    (report / "report.json").write_text('{"rows": {}, "adaptor_sha256": null}')
    with pytest.raises(HipaError, match="measured no adaptor"):
        written("emoji", tmp_path / "out", reports=(report,))


def test_the_figures_of_coco_are_in_the_card(
    report: Path, coco_report: Path, tmp_path: Path
) -> None:
    out = written("emoji", tmp_path / "out", reports=(report, coco_report))
    card = (out / "README.md").read_text()
    quality = card[card.index("## Measured quality") : card.index("## Limits")]
    assert "| HiPA | 0.1 |" in quality
    assert "### FID-30k on COCO 2014\n" in quality
    # The figures with their intervals, and the protocol.
    row = r"\| HiPA, one step \| [\d.]+ \([-\d.]+ to [\d.]+\) \| 0\.\d{4} \(0\.\d+ to 0\.\d+\) \|"
    assert re.search(row, quality)
    assert "#### Protocol\n" in quality
    assert "mean cosine of image and caption by clip-vit-g-14" in quality
    assert (out / "quality/coco-2014/report.json").is_file()
    assert not list(out.rglob("hipa-one-step"))


def test_a_coco_report_that_does_not_fit_is_refused(coco_report: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="measured something else"):
        written("emoji-edit", tmp_path / "other", reports=(coco_report,))
    with pytest.raises(HipaError, match="of the same kind as another one"):
        written("emoji", tmp_path / "twice", reports=(coco_report, coco_report))
    (coco_report / "report.json").write_text('{"rows": {}, "protocol": {"year": 2014}}')
    with pytest.raises(HipaError, match="is no report on COCO"):
        written("emoji", tmp_path / "damaged", reports=(coco_report,))


def test_a_report_without_its_samples_is_refused(report: Path, tmp_path: Path) -> None:
    (report / "samples.png").unlink()
    with pytest.raises(HipaError, match=r"has no samples.png. Expected a folder"):
        written("emoji", tmp_path / "out", reports=(report,))


def test_what_the_card_lacks_is_said(tmp_path: Path) -> None:
    with pytest.warns(HipaWarning, match=r"--base-model owner/name\) and its licence"):
        written("emoji", tmp_path / "out")


def test_an_adaptor_of_an_unknown_model_needs_the_model(adaptor: Path, tmp_path: Path) -> None:
    change(adaptor, base_unet_sha256="tensors-v1:" + "0" * 64)
    with pytest.raises(HipaError, match=r"knows only its hash. Give --model"):
        written(adaptor, tmp_path / "out")
    with pytest.raises(HipaError, match="was trained on another base model"):
        written(adaptor, tmp_path / "out2", model=str(MODEL))


def change(adaptor: Path, **values: object) -> None:
    metadata = json.loads((adaptor / METADATA).read_text())
    (adaptor / METADATA).write_text(json.dumps({**metadata, **values}))


@pytest.mark.parametrize(
    "path",
    [
        "/home/ada/data/captions.txt",
        "/home/zoë/data/captions.txt",
        r"C:\Users\ada\captions.txt",
        "HERE/captions.txt",
        "/data/clients/acme/captions.txt",
        "/Users/Ada Lovelace/captions.txt",
        r"D:\clients\acme\captions.txt",
        r"\\server\acme\captions.txt",
    ],
)
def test_a_path_of_this_machine_is_refused(adaptor: Path, tmp_path: Path, path: str) -> None:
    change(adaptor, recipe={"prompts": path.replace("HERE", str(tmp_path))})
    with pytest.raises(HipaError, match=r"hipa_adaptor.json names the path .*captions"):
        written(adaptor, tmp_path / "out")


def test_a_path_in_a_report_is_refused(report: Path, tmp_path: Path) -> None:
    numbers = json.loads((report / "report.json").read_text())
    (report / "report.json").write_text(json.dumps(numbers | {"rows": {"/data/acme/images": {}}}))
    with pytest.raises(HipaError, match=r"report.json names the path /data/acme/images"):
        written("emoji", tmp_path / "out", reports=(report,))


@pytest.mark.parametrize("name", ["me", "me/a/b", "me/..", "/me", "me/a b", "me/x.git", "a" * 99])
def test_a_repository_that_cannot_be(name: str) -> None:
    with pytest.raises(HipaError, match="Expected owner/name"):
        check_hub_id("--repo", name)


def test_what_a_model_in_one_file_is_of(adaptor: Path, model_with_licence: Path) -> None:
    """The card's model is read as hipa-train reads it, which takes --config for a file alone."""
    for source in (adaptor, "emoji-bundle"):
        wishes = Wishes("me/one-step", str(model_with_licence), config="sd21-v")
        with pytest.raises(HipaError, match="--config is for a checkpoint in one file"):
            open_publication(str(source), wishes)


@pytest.mark.parametrize("source", ["adaptor", "emoji-bundle"])
def test_a_model_in_one_file_without_a_vae(
    adaptor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """It was trained and exported with --vae; of the model the UNet alone is asked for."""
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    whole = load_file(write_checkpoint(MODEL, tmp_path / "whole.safetensors"))
    checkpoint = tmp_path / "noVAE.safetensors"
    save_file(
        {n: w for n, w in whole.items() if not n.startswith("first_stage_model.")}, checkpoint
    )
    wishes = Wishes("me/one-step", str(checkpoint), config=str(MODEL))
    open_publication(str(adaptor) if source == "adaptor" else source, wishes)
