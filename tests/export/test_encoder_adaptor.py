"""A super-resolution adaptor with weights for the VAE's encoder too.

They are merged into the encoder's stage, and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import export_swap
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.task import choose_task
from hipa_deploy.images.example_source import example_image
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS
from hipa_deploy.train.evaluation.task_images import one_step_task_images

SMALL_HWC = example_image(8, 8)
PROMPT = "a green pear"


@pytest.fixture(scope="module")
def bundle(
    model_dir: Path, encoder_adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "b"
    return export_bundle(
        ExportOptions(model=str(model_dir), adaptor=encoder_adaptor_dir, out=out, dtype="fp32")
    )


def test_the_bundle_makes_what_training_measured(
    model_dir: Path, encoder_adaptor_dir: Path, bundle: Bundle
) -> None:
    expected = one_step_task_images(
        model_dir, encoder_adaptor_dir, "upscale", SMALL_HWC[None], [PROMPT], [0]
    )
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        made = pipe.upscale(SMALL_HWC, PROMPT).images_BHWC
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert bundle.manifest.encoder is not None
    assert bundle.manifest.encoder.adaptor_sha256 == file_sha256(
        encoder_adaptor_dir / ENCODER_WEIGHTS
    )


def test_only_the_unet_is_swapped(
    model_dir: Path, encoder_adaptor_dir: Path, adaptor_dir: Path, bundle: Bundle, tmp_path: Path
) -> None:
    options = SwapOptions(
        model=str(model_dir), adaptor=encoder_adaptor_dir, bundle=bundle.root, out=tmp_path / "x"
    )
    with pytest.raises(HipaError, match=r"is on the VAE's encoder too, which no swap changes"):
        export_swap(options)
    with pytest.raises(HipaError, match=r"has an adaptor on its encoder, which no swap takes out"):
        export_swap(replace(options, adaptor=adaptor_dir))
    with pytest.raises(HipaError, match=r"has an adaptor on its encoder, which no swap takes out"):
        AdaptorSwap.open(bundle, adaptor_dir)
    assert not (tmp_path / "x").exists()


def test_a_tiny_encoder_does_not_take_it(
    model_dir: Path, encoder_adaptor_dir: Path, tmp_path: Path
) -> None:
    options = ExportOptions(
        model=str(model_dir), adaptor=encoder_adaptor_dir, out=tmp_path / "b", encoder=tmp_path
    )
    with pytest.raises(HipaError, match=r"adapts the VAE's own encoder\. Leave out --encoder .*\."):
        choose_task(options, ModelParts.open(str(model_dir)))
