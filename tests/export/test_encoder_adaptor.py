"""A super-resolution adaptor with a part on the VAE's encoder: merged into the encoder's stage, and nowhere else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_swap import SwapOptions, export_swap
from hipa_deploy.export.merge import merge_encoder_adaptor
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.task import choose_task
from hipa_deploy.hashing import file_sha256
from hipa_deploy.images.example_source import example_image
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS
from hipa_deploy.train.evaluation.task_images import one_step_task_images
from hipa_deploy.train.model.encoder_adaptor import (
    add_encoder_adaptor,
    attach_encoder_adaptor,
    save_encoder_adaptor,
)
from hipa_deploy.train.model.unet_adaptor import adaptor_parameters
from tests.export.conftest import make_adaptor

SMALL_HWC = example_image(8, 8)
PROMPT = "a green pear"


def load_vae(model_dir: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(model_dir, subfolder="vae").eval()


@pytest.fixture(scope="module")
def adaptor(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For super-resolution, with B matrices of the encoder that are not zero."""
    folder = make_adaptor(
        model_dir, tmp_path_factory.mktemp("both") / "adaptor", task="upscale", timestep=249
    )
    vae = load_vae(model_dir).requires_grad_(False)
    add_encoder_adaptor(vae, 2, seed=0)
    with torch.no_grad():
        for index, weight in enumerate(adaptor_parameters(vae).values()):
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    save_encoder_adaptor(vae, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(model_dir: Path, adaptor: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "b"
    return export_bundle(
        ExportOptions(model=str(model_dir), adaptor=adaptor, out=out, dtype="fp32")
    )


@torch.no_grad()
def encoded(vae: AutoencoderKL) -> torch.Tensor:
    return vae.encode(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).latent_dist.mean


def test_merged_equals_unmerged(model_dir: Path, adaptor: Path) -> None:
    merged, attached, plain = (load_vae(model_dir) for _ in range(3))
    assert merge_encoder_adaptor(merged, adaptor) == file_sha256(adaptor / ENCODER_WEIGHTS)
    attach_encoder_adaptor(attached, adaptor)
    torch.testing.assert_close(encoded(merged), encoded(attached), atol=1e-5, rtol=1e-4)
    assert (encoded(merged) - encoded(plain)).abs().max() > 1e-3
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_an_adaptor_without_it_leaves_the_encoder(model_dir: Path, adaptor_dir: Path) -> None:
    vae = load_vae(model_dir)
    assert merge_encoder_adaptor(vae, adaptor_dir) is None
    assert merge_encoder_adaptor(vae, None) is None
    assert torch.equal(encoded(vae), encoded(load_vae(model_dir)))


def test_the_bundle_makes_what_training_measured(
    model_dir: Path, adaptor: Path, bundle: Bundle
) -> None:
    expected = one_step_task_images(model_dir, adaptor, "upscale", SMALL_HWC[None], [PROMPT], [0])
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        made = pipe.upscale(SMALL_HWC, PROMPT).images_BHWC
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert bundle.manifest.encoder is not None
    assert bundle.manifest.encoder.adaptor_sha256 == file_sha256(adaptor / ENCODER_WEIGHTS)


def test_only_the_unet_is_swapped(
    model_dir: Path, adaptor: Path, adaptor_dir: Path, bundle: Bundle, tmp_path: Path
) -> None:
    asked = SwapOptions(
        model=str(model_dir), adaptor=adaptor, bundle=bundle.root, out=tmp_path / "x"
    )
    with pytest.raises(HipaError, match=r"is on the VAE's encoder too, which no swap changes"):
        export_swap(asked)
    with pytest.raises(HipaError, match=r"has an adaptor on its encoder, which no swap takes out"):
        export_swap(replace(asked, adaptor=adaptor_dir))
    with pytest.raises(HipaError, match=r"has an adaptor on its encoder, which no swap takes out"):
        AdaptorSwap.open(bundle, adaptor_dir)
    assert not (tmp_path / "x").exists()


def test_a_tiny_encoder_does_not_take_it(model_dir: Path, adaptor: Path, tmp_path: Path) -> None:
    asked = ExportOptions(
        model=str(model_dir), adaptor=adaptor, out=tmp_path / "b", encoder=tmp_path
    )
    with pytest.raises(HipaError, match=r"adapts the VAE's own encoder\. Leave out --encoder .*\."):
        choose_task(asked, ModelParts.open(str(model_dir)))


def test_what_cannot_be_merged(model_dir: Path, adaptor: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="adaptor scale nan is not a number"):
        merge_encoder_adaptor(load_vae(model_dir), adaptor, float("nan"))
    with pytest.raises(HipaError, match=r"merging made .* infinite. Lower --adaptor-scale"):
        merge_encoder_adaptor(load_vae(model_dir), adaptor, 1e38 * 10)
    shutil.copytree(adaptor, tmp_path / "cut")
    (tmp_path / "cut" / ENCODER_WEIGHTS).write_bytes((adaptor / ENCODER_WEIGHTS).read_bytes()[:100])
    with pytest.raises(HipaError, match=rf"{ENCODER_WEIGHTS} cannot be read: "):
        merge_encoder_adaptor(load_vae(model_dir), tmp_path / "cut")
    for weights, message in (
        ({}, "holds nothing"),
        (
            {"encoder.conv_in.lora_A.weight": torch.full((2, 3, 3, 3), torch.nan)},
            "holds NaN or infinity",
        ),
        (
            {"encoder.other.lora_A.weight": torch.zeros(2, 3)},
            "does not fit this VAE: it has no layer encoder.other",
        ),
        (
            {"encoder.conv_in.lora_A.weight": torch.zeros(2, 3, 3, 3)},
            "does not fit this VAE: list index",
        ),
        (
            {
                "encoder.conv_in.lora_A.weight": torch.zeros(2, 5, 3, 3),
                "encoder.conv_in.lora_B.weight": torch.zeros(8, 2, 1, 1),
            },
            "does not fit this VAE: size mismatch",
        ),
    ):
        save_file(weights, tmp_path / "cut" / ENCODER_WEIGHTS)
        with pytest.raises(HipaError, match=message):
            merge_encoder_adaptor(load_vae(model_dir), tmp_path / "cut")
