import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export.merge import merge_adaptor, merge_encoder_adaptor
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, WEIGHTS
from hipa_deploy.train.model.encoder_adaptor import attach_encoder_adaptor
from tests.export.conftest import make_adaptor


def load_unet(model_dir: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet").eval()


@torch.no_grad()
def answer(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, 16, generator=generator)
    return unet(noise, 999, context).sample


def changed(adaptor: Path, out: Path, **tensors: torch.Tensor) -> Path:
    """A copy of the adaptor with tensors replaced or added."""
    shutil.copytree(adaptor, out)
    save_file(load_file(adaptor / WEIGHTS) | tensors, out / WEIGHTS)
    return out


@pytest.mark.parametrize("preset", ["paper", "full"])
def test_merged_equals_unmerged_with_alpha_other_than_rank(
    model_dir: Path, tmp_path: Path, preset: str
) -> None:
    adaptor = make_adaptor(model_dir, tmp_path / "adaptor", preset=preset, rank=4, alpha=8.0)
    pipe = StableDiffusionPipeline.from_pretrained(model_dir)
    plain = answer(pipe.unet)
    pipe.load_lora_weights(adaptor)
    unet = load_unet(model_dir)
    info = merge_adaptor(unet, adaptor)
    assert (info.rank, info.alpha, info.scale) == (4, 8.0, 1.0)
    torch.testing.assert_close(answer(unet), answer(pipe.unet), atol=1e-5, rtol=1e-4)
    assert (answer(unet) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_merged_weights_are_bit_for_bit_what_peft_fuses(
    model_dir: Path, tmp_path: Path, scale: float
) -> None:
    adaptor = make_adaptor(model_dir, tmp_path / "adaptor", preset="full", rank=4, alpha=6.0)
    fused = load_unet(model_dir)
    fused.load_lora_adapter(str(adaptor), prefix="unet", weight_name=WEIGHTS)
    fused.fuse_lora(lora_scale=scale)
    fused.unload_lora()
    merged = load_unet(model_dir)
    merge_adaptor(merged, adaptor, scale)
    expected = fused.state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_merged_unet_has_exactly_its_own_modules(model_dir: Path, adaptor_dir: Path) -> None:
    unet = load_unet(model_dir)
    names = [name for name, _ in unet.named_parameters()]
    merge_adaptor(unet, adaptor_dir)
    assert [name for name, _ in unet.named_parameters()] == names


def test_scale_zero_is_the_base_and_a_half_is_between(model_dir: Path, adaptor_dir: Path) -> None:
    plain = load_unet(model_dir)
    weight = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    merged = {}
    for scale in (0.0, 0.5, 1.0):
        unet = load_unet(model_dir)
        merge_adaptor(unet, adaptor_dir, scale)
        merged[scale] = unet.get_parameter(weight)
    torch.testing.assert_close(merged[0.0], plain.get_parameter(weight))
    torch.testing.assert_close(merged[0.5], (merged[0.0] + merged[1.0]) / 2)


def test_a_shape_that_does_not_fit(model_dir: Path, adaptor_dir: Path, tmp_path: Path) -> None:
    key = next(key for key in load_file(adaptor_dir / WEIGHTS) if "to_q.lora_A" in key)
    bad = changed(adaptor_dir, tmp_path / "bad", **{key: torch.zeros(4, 999)})
    with pytest.raises(HipaError, match="It is for another model"):
        merge_adaptor(load_unet(model_dir), bad)


def test_a_layer_the_unet_does_not_have(model_dir: Path, adaptor_dir: Path, tmp_path: Path) -> None:
    extra = {f"unet.no_such_block.to_q.lora_{m}.weight": torch.zeros(4, 4) for m in "AB"}
    with pytest.raises(HipaError, match=r"no layer unet\.no_such_block"):
        merge_adaptor(load_unet(model_dir), changed(adaptor_dir, tmp_path / "bad", **extra))


def test_nan_is_refused(model_dir: Path, adaptor_dir: Path, tmp_path: Path) -> None:
    key, value = next(iter(load_file(adaptor_dir / WEIGHTS).items()))
    with pytest.raises(HipaError, match="NaN"):
        merge_adaptor(
            load_unet(model_dir),
            changed(adaptor_dir, tmp_path / "bad", **{key: value * float("nan")}),
        )


def test_overflow_is_refused(model_dir: Path, adaptor_dir: Path) -> None:
    with pytest.raises(HipaError, match=r"makes it infinite\. Lower --adaptor-scale"):
        merge_adaptor(load_unet(model_dir), adaptor_dir, 1e38 * 10)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(model_dir: Path, adaptor_dir: Path, scale: float) -> None:
    with pytest.raises(HipaError, match="scale"):
        merge_adaptor(load_unet(model_dir), adaptor_dir, scale)


def test_missing_truncated_and_foreign_files(
    model_dir: Path, adaptor_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match="no pytorch_lora"):
        merge_adaptor(load_unet(model_dir), tmp_path)
    shutil.copytree(adaptor_dir, tmp_path / "cut")
    data = (adaptor_dir / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(HipaError, match="cannot be read"):
        merge_adaptor(load_unet(model_dir), tmp_path / "cut")
    (tmp_path / "text").mkdir()
    save_file({"text_encoder.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "text" / WEIGHTS)
    with pytest.raises(HipaError, match=r"holds text_encoder\.x"):
        merge_adaptor(load_unet(model_dir), tmp_path / "text")


def load_vae(model_dir: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(model_dir, subfolder="vae").eval()


@torch.no_grad()
def encoded(vae: AutoencoderKL) -> torch.Tensor:
    return vae.encode(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).latent_dist.mean


def test_a_merged_encoder_equals_an_unmerged_one(
    model_dir: Path, encoder_adaptor_dir: Path
) -> None:
    merged, attached, plain = (load_vae(model_dir) for _ in range(3))
    assert merge_encoder_adaptor(merged, encoder_adaptor_dir) == file_sha256(
        encoder_adaptor_dir / ENCODER_WEIGHTS
    )
    attach_encoder_adaptor(attached, encoder_adaptor_dir)
    torch.testing.assert_close(encoded(merged), encoded(attached), atol=1e-5, rtol=1e-4)
    assert (encoded(merged) - encoded(plain)).abs().max() > 1e-3
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_an_adaptor_without_encoder_weights_leaves_the_encoder(
    model_dir: Path, adaptor_dir: Path
) -> None:
    vae = load_vae(model_dir)
    assert merge_encoder_adaptor(vae, adaptor_dir) is None
    assert merge_encoder_adaptor(vae, None) is None
    assert torch.equal(encoded(vae), encoded(load_vae(model_dir)))


def test_encoder_weights_that_cannot_be_merged(
    model_dir: Path, encoder_adaptor_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match="scale nan is not a number"):
        merge_encoder_adaptor(load_vae(model_dir), encoder_adaptor_dir, float("nan"))
    with pytest.raises(HipaError, match=r"makes it infinite\. Lower --adaptor-scale"):
        merge_encoder_adaptor(load_vae(model_dir), encoder_adaptor_dir, 1e38 * 10)
    shutil.copytree(encoder_adaptor_dir, tmp_path / "cut")
    (tmp_path / "cut" / ENCODER_WEIGHTS).write_bytes(
        (encoder_adaptor_dir / ENCODER_WEIGHTS).read_bytes()[:100]
    )
    with pytest.raises(HipaError, match=rf"{ENCODER_WEIGHTS} cannot be read: "):
        merge_encoder_adaptor(load_vae(model_dir), tmp_path / "cut")
    for weights, message in (
        ({}, "holds no tensors"),
        (
            {"encoder.conv_in.lora_A.weight": torch.full((2, 3, 3, 3), torch.nan)},
            "holds NaN or infinity",
        ),
        (
            {"encoder.other.lora_A.weight": torch.zeros(2, 3)},
            r"its vae has no layer encoder\.other",
        ),
        (
            {"encoder.conv_in.lora_A.weight": torch.zeros(2, 3, 3, 3)},
            "has down, and up is missing",
        ),
        (
            {
                "encoder.conv_in.lora_A.weight": torch.zeros(2, 5, 3, 3),
                "encoder.conv_in.lora_B.weight": torch.zeros(8, 2, 1, 1),
            },
            "It is for another model",
        ),
    ):
        save_file(weights, tmp_path / "cut" / ENCODER_WEIGHTS)
        with pytest.raises(HipaError, match=message):
            merge_encoder_adaptor(load_vae(model_dir), tmp_path / "cut")
