import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from hipa_deploy.errors import HipaError
from hipa_deploy.export.model_parts import ModelParts, free_memory
from hipa_deploy.models.decoder_folder import DECODER_METADATA, DecoderFidelity, DecoderMetadata
from hipa_deploy.models.kind import UNSUPPORTED


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_constants_of_the_step(model_dir: Path) -> None:
    step = ModelParts.open(model_dir).one_step(999, None, None)
    assert step.alpha_bar == pytest.approx(0.0046601, abs=1e-7)
    assert (step.latent_shape, step.height, step.width) == ((4, 8, 8), 32, 32)
    assert step.prediction_type == "epsilon"


def test_height_is_height(model_dir: Path) -> None:
    step = ModelParts.open(model_dir).one_step(999, 64, 32)
    assert (step.latent_shape, step.height, step.width) == ((4, 16, 8), 64, 32)


@pytest.mark.parametrize(
    ("height", "message"), [(33, "32 is nearest"), (-8, "multiple"), (1_000_000, "too large")]
)
def test_absurd_sizes(model_dir: Path, height: int, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        ModelParts.open(model_dir).one_step(999, height, None)


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing-here"])
def test_missing_model(name: str) -> None:
    with pytest.raises(HipaError, match="does not exist"):
        ModelParts.open(name)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"model_index\.json"):
        ModelParts.open(tmp_path)


def test_a_second_encoder_that_is_not_there(copy: Path) -> None:
    edit(copy / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(HipaError, match=r"no readable text_encoder_2/config\.json"):
        ModelParts.open(copy)


def test_another_unet_is_refused(copy: Path) -> None:
    edit(copy / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    with pytest.raises(HipaError, match="UNet3DConditionModel"):
        ModelParts.open(copy)


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_added_conditions_are_refused_by_name(copy: Path, key: str) -> None:
    edit(copy / "unet/config.json", **{key: 8})
    with pytest.raises(HipaError, match=f"has {key}=8"):
        ModelParts.open(copy).unet()


def test_truncated_weights(copy: Path) -> None:
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HipaError, match="is damaged: "):
        ModelParts.open(copy).unet()


def test_nan_weights(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[next(iter(weights))].fill_(float("nan"))
    save_file(weights, path)
    with pytest.raises(HipaError, match="NaN"):
        ModelParts.open(copy).vae()


def make_decoder(folder: Path, *, levels: int = 3, latent_channels: int = 4) -> Path:
    sizes = {"decoder_block_out_channels": (8,) * levels, "num_decoder_blocks": (1,) * levels}
    encoder = {"encoder_block_out_channels": (8,) * levels, "num_encoder_blocks": (1,) * levels}
    AutoencoderTiny(**sizes, **encoder, latent_channels=latent_channels).save_pretrained(folder)
    return folder


def test_a_decoder_for_these_latents(model_dir: Path, tmp_path: Path) -> None:
    tiny = ModelParts.open(model_dir).tiny_decoder(make_decoder(tmp_path / "tiny"))
    assert tiny.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 4}, "enlarges 8 times, expected 4 and 4"),
        ({"latent_channels": 16}, "16 latent channels"),
    ],
)
def test_a_decoder_for_other_latents(
    model_dir: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(HipaError, match=message):
        ModelParts.open(model_dir).tiny_decoder(make_decoder(tmp_path / "tiny", **changes))


@pytest.mark.parametrize("factor", [0, -1.0, "0.13", True, None])
def test_a_decoder_without_a_usable_factor(model_dir: Path, tmp_path: Path, factor: Any) -> None:
    folder = make_decoder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": factor}))
    with pytest.raises(HipaError, match=r"scaling_factor .*\. Expected a number above 0"):
        ModelParts.open(model_dir).check_tiny_decoder(folder)


def test_a_decoder_of_another_vae(model_dir: Path, tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "tiny")
    metadata = DecoderMetadata(
        base_vae_sha256="0" * 64, latent_channels=4, factor=4, steps_trained=1, recipe={},
        fidelity=DecoderFidelity(images=1, psnr_db=20, perceptual_distance=0.5),
    )  # fmt: skip
    (folder / DECODER_METADATA).write_text(metadata.model_dump_json())
    with pytest.raises(HipaError, match="another VAE"):
        ModelParts.open(model_dir).tiny_decoder(folder)


@pytest.mark.parametrize(
    ("name", "message"), [("none", "does not exist"), ("empty", "it has no config.json")]
)
def test_no_decoder(model_dir: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HipaError, match=message):
        ModelParts.open(model_dir).tiny_decoder(tmp_path / name)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such call")
def test_memory_of_freed_weights_goes_back_to_the_system() -> None:
    """glibc keeps freed blocks, once it has seen larger ones come and go."""
    for _ in range(4):
        torch.ones(4 << 20)  # 16 MiB
    weights = [torch.ones(1 << 18) for _ in range(256)]  # 256 MiB
    kept = [torch.ones(1) for _ in range(256)]
    full = resident_mib()
    del weights
    free_memory()
    assert resident_mib() < full - 200
    assert len(kept) == 256


def resident_mib() -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
    )
    return int(line.split()[1]) >> 10
