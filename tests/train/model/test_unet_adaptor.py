from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, AdaptorMetadata, read_metadata, unet_sha256
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import (
    FULL,
    METADATA,
    PAPER,
    adaptor_parameters,
    add_adaptor,
    attach_adaptor,
    load_adaptor_weights,
    save_adaptor,
    without_adaptor,
)

SD21_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "use_linear_projection": True,
}


def metadata_of(model: DiffusionModel, rank: int, alpha: float) -> AdaptorMetadata:
    return AdaptorMetadata(
        base_unet_sha256=unet_sha256(model.folder),
        prompts_sha256="",
        rank=rank,
        alpha=alpha,
        targets=FULL,
        timestep=999,
        prediction_type="epsilon",
        alpha_bar=0.00466,
        resolution=(32, 32),
        steps_trained=1,
        recipe={},
    )


def with_random_adaptor(model: DiffusionModel, rank: int = 2, alpha: float = 2) -> DiffusionModel:
    """``model`` with an adaptor whose weights are all random, as after training."""
    add_adaptor(model.unet, targets=FULL, rank=rank, alpha=alpha, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adaptor_parameters(model.unet).values():
            weight.normal_(std=0.1)
    return model


def save(model: DiffusionModel, out: Path, alpha: float = 2) -> Path:
    return save_adaptor(model.unet, metadata_of(model, 2, alpha), model.schedule, out)


def output(model: DiffusionModel) -> torch.Tensor:
    """The UNet's output for a fixed noise and prompt."""
    with torch.no_grad():
        return model.unet(model.noise([3]), 999, model.context(["a green pear"])).sample


def test_paper_preset_has_the_papers_parameter_count() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21_UNET)
        add_adaptor(unet, targets=PAPER, rank=16, alpha=16, seed=0)
    assert sum(weight.numel() for weight in adaptor_parameters(unet).values()) == 3_319_808


@pytest.mark.parametrize("targets", [PAPER, FULL])
def test_trains_the_adaptor_and_nothing_else(
    model: DiffusionModel, targets: tuple[str, ...]
) -> None:
    endings = tuple(f".{target}" for target in targets)
    expected = set()
    for name, _ in model.unet.named_modules():
        if name.endswith(endings):
            expected.add(f"{name}.lora_A.default.weight")
            expected.add(f"{name}.lora_B.default.weight")
    before = output(model)
    add_adaptor(model.unet, targets=targets, rank=2, alpha=2, seed=0)
    assert adaptor_parameters(model.unet).keys() == expected
    assert torch.equal(output(model), before)  # B = 0


def test_base_function_without_the_adaptor(model: DiffusionModel) -> None:
    before = output(model)
    weights = adaptor_parameters(with_random_adaptor(model).unet)
    after = output(model)
    with without_adaptor(model.unet):
        assert torch.equal(output(model), before)
    assert torch.equal(output(model), after)
    assert adaptor_parameters(model.unet).keys() == weights.keys()


def test_initial_weights_depend_on_the_seed_alone(model_dir: Path) -> None:
    def initial_weights(seed: int) -> torch.Tensor:
        model = DiffusionModel.load(model_dir, "cpu")
        torch.randn(seed + 3)
        add_adaptor(model.unet, targets=PAPER, rank=2, alpha=2, seed=seed)
        return torch.cat([weight.flatten() for weight in adaptor_parameters(model.unet).values()])

    assert torch.equal(initial_weights(0), initial_weights(0))
    assert not torch.equal(initial_weights(0), initial_weights(1))


def test_target_without_a_layer_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(HipaError, match="'to_nowhere' matches no layer"):
        add_adaptor(model.unet, targets=("to_q", "to_nowhere"), rank=2, alpha=2, seed=0)


@pytest.mark.parametrize("alpha", [2.0, 6.0])
def test_diffusers_loads_what_was_trained(
    model: DiffusionModel, tmp_path: Path, alpha: float
) -> None:
    expected = output(with_random_adaptor(model, alpha=alpha))
    folder = save(model, tmp_path / "adaptor", alpha)
    fresh = DiffusionModel.load(model.folder, "cpu")
    assert not torch.allclose(output(fresh), expected, atol=1e-3)
    fresh.pipe.load_lora_weights(folder)
    assert torch.allclose(output(fresh), expected, atol=1e-6)
    attached = DiffusionModel.load(model.folder, "cpu")
    attach_adaptor(attached.unet, folder)
    assert torch.allclose(output(attached), expected, atol=1e-6)
    files = {METADATA, "pytorch_lora_weights.safetensors", "scheduler"}
    assert {path.name for path in folder.iterdir()} == files
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["set_alpha_to_one"] is True


def test_training_continues_from_a_folder(model: DiffusionModel, tmp_path: Path) -> None:
    expected = output(with_random_adaptor(model))
    folder = save(model, tmp_path / "adaptor")
    fresh = DiffusionModel.load(model.folder, "cpu")
    add_adaptor(fresh.unet, targets=FULL, rank=2, alpha=2, seed=9)
    load_adaptor_weights(fresh.unet, folder)
    assert torch.equal(output(fresh), expected)


def test_half_precision_halves_the_file(model: DiffusionModel, tmp_path: Path) -> None:
    expected = output(with_random_adaptor(model))
    half = metadata_of(model, 2, 2).model_copy(update={"recipe": {"adaptor": {"dtype": "float16"}}})
    folder = save_adaptor(model.unet, half, model.schedule, tmp_path / "half")

    stored = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    trained = load_file(save(model, tmp_path / "whole") / WEIGHTS)
    assert all(torch.equal(trained[name].half(), tensor) for name, tensor in stored.items())

    diffusers_model, attached, continued = (
        DiffusionModel.load(model.folder, "cpu") for _ in range(3)
    )
    diffusers_model.pipe.load_lora_weights(folder)
    assert torch.allclose(output(diffusers_model), expected, atol=2e-3)
    attach_adaptor(attached.unet, folder)
    add_adaptor(continued.unet, targets=FULL, rank=2, alpha=2, seed=9)
    load_adaptor_weights(continued.unet, folder)
    for one in (attached, continued):
        assert {weight.dtype for weight in one.unet.parameters()} == {torch.float32}
        assert torch.equal(output(one), output(diffusers_model))


def test_weights_too_large_for_half_precision_are_refused(
    model: DiffusionModel, tmp_path: Path
) -> None:
    with_random_adaptor(model)
    with torch.no_grad():
        next(iter(adaptor_parameters(model.unet).values())).fill_(70_000)
    half = metadata_of(model, 2, 2).model_copy(update={"recipe": {"adaptor": {"dtype": "float16"}}})
    with pytest.raises(HipaError, match=r"as large as 7e\+04. Expected at most 65504"):
        save_adaptor(model.unet, half, model.schedule, tmp_path / "half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("targets", "rank", "alpha"), [(PAPER, 2, 2), (FULL, 4, 4), (FULL, 2, 1)])
def test_training_refuses_another_preset_rank_or_alpha(
    model: DiffusionModel, tmp_path: Path, targets: tuple[str, ...], rank: int, alpha: float
) -> None:
    folder = save(with_random_adaptor(model), tmp_path / "adaptor")
    fresh = DiffusionModel.load(model.folder, "cpu")
    add_adaptor(fresh.unet, targets=targets, rank=rank, alpha=alpha, seed=0)
    with pytest.raises(HipaError, match="another preset, rank or alpha"):
        load_adaptor_weights(fresh.unet, folder)


def test_broken_folders_are_refused(
    model: DiffusionModel, v_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match=r"has no hipa_adaptor.json"):
        read_metadata(tmp_path)
    folder = save(with_random_adaptor(model), tmp_path / "adaptor")
    assert read_metadata(folder, model.folder).rank == 2
    with pytest.raises(HipaError, match="trained on another base model"):
        read_metadata(folder, v_model_dir)
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(HipaError, match="is damaged"):
        load_adaptor_weights(model.unet, folder)
    with pytest.raises(HipaError, match="cannot be read"):
        attach_adaptor(model.unet, folder)
    (folder / METADATA).write_text("{}")
    with pytest.raises(HipaError, match="Field required"):
        read_metadata(folder)


def test_nothing_is_overwritten_and_nothing_is_half_written(
    model: DiffusionModel, tmp_path: Path
) -> None:
    with_random_adaptor(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(HipaError, match="is not empty"):
        save(model, tmp_path / "full")
    with torch.no_grad():
        next(iter(adaptor_parameters(model.unet).values())).fill_(float("nan"))
    with pytest.raises(HipaError, match="is not finite"):
        save(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
