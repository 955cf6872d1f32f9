"""Averages of adaptors: the mean of what they add to the weights, not of their factors."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from hipa_deploy.commands.app import app
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA, WEIGHTS, read_metadata
from hipa_deploy.train.average_adaptors import average_adaptors, average_pairs
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import attach_adaptor
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor


@pytest.fixture(scope="module")
def adaptors(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, cache: Path) -> list[Path]:
    """Two adaptors of other seeds, presets, ranks and alphas."""
    folder = tmp_path_factory.mktemp("adaptors")
    made = []
    settings = ((0, "full", 2, 3.0), (1, "paper", 3, None))
    for seed, preset, rank, alpha in settings:
        recipe = Recipe.model_validate(
            {
                "prompts": "model:prompts.txt",
                "steps": 2,
                "batch": 2,
                "samples": 1,
                "seed": seed,
                "adaptor": {"preset": preset, "rank": rank, "alpha": alpha},
                "teacher": {"steps": 2, "pairs": 4},
                "loss": {"latent_warmup_steps": 2},
                "optimiser": {"learning_rate": 0.05},
            }
        )
        out = folder / str(seed)
        quiet = Console(file=io.StringIO())
        train_adaptor(recipe, model_dir, out, cache=cache, console=quiet, device="cpu")
        made.append(out)
    return made


def merged(model_dir: Path, adaptor: Path | None) -> dict[str, Tensor]:
    """The UNet's weights with an adaptor merged by peft."""
    unet = UNet2DConditionModel.from_pretrained(model_dir / "unet")
    if adaptor is not None:
        attach_adaptor(unet, adaptor)
        unet.fuse_lora()
        unet.unload_lora()
    return dict(unet.state_dict())


def test_the_average_adds_the_mean_of_what_the_adaptors_add(
    adaptors: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    made = average_adaptors(adaptors, tmp_path / "average", rank=5)
    assert made.rank == 5
    assert made.error < 1e-6  # the ranks of both together are five
    one = merged(model_dir, adaptors[0])
    two = merged(model_dir, adaptors[1])
    base = merged(model_dir, None)
    average = merged(model_dir, made.folder)
    assert average.keys() == base.keys()
    changed = 0
    for name, weight in average.items():
        torch.testing.assert_close(weight, (one[name] + two[name]) / 2, rtol=1e-4, atol=1e-6)
        changed += int(not torch.equal(weight, base[name]))
    assert changed > 20


def test_diffusers_loads_it_as_any_adaptor(
    adaptors: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    made = average_adaptors(adaptors, tmp_path / "average")
    assert made.rank == 3
    assert read_metadata(made.folder, model_dir).rank == 3
    ours = DiffusionModel.load(model_dir, "cpu")
    attach_adaptor(ours.unet, made.folder)
    theirs = DiffusionModel.load(model_dir, "cpu")
    theirs.pipe.load_lora_weights(made.folder)
    z = torch.randn(1, *ours.latent_shape_CHW)
    context = ours.context(["a boat"])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.unet(z, 999, context).sample, theirs.unet(z, 999, context).sample
        )


def stored_as(adaptor: Path, dtype: str, out: Path) -> Path:
    """A copy of an adaptor whose weights are stored in another dtype."""
    shutil.copytree(adaptor, out)
    tensors = load_file(out / WEIGHTS)
    with safe_open(out / WEIGHTS, "pt") as file:
        header = file.metadata()
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(cast, out / WEIGHTS, header)
    record = json.loads((out / METADATA).read_text())
    record["recipe"]["adaptor"]["dtype"] = dtype
    (out / METADATA).write_text(json.dumps(record))
    return out


@pytest.mark.parametrize(("second", "expected"), [("float16", "float16"), ("float32", "float32")])
def test_it_is_stored_in_float16_where_all_adaptors_are(
    adaptors: list[Path], model_dir: Path, tmp_path: Path, second: str, expected: str
) -> None:
    folders = [
        stored_as(adaptors[0], "float16", tmp_path / "0"),
        stored_as(adaptors[1], second, tmp_path / "1"),
    ]
    made = average_adaptors(folders, tmp_path / "average", rank=5)
    tensors = load_file(made.folder / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, expected)}
    assert read_metadata(made.folder).recipe["adaptor"]["dtype"] == expected
    one = merged(model_dir, adaptors[0])
    two = merged(model_dir, adaptors[1])
    for name, weight in merged(model_dir, made.folder).items():
        torch.testing.assert_close(weight, (one[name] + two[name]) / 2, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("window", [(), (3, 3)])
def test_the_rank_leaves_out_the_smallest_singular_values(window: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ones = (1,) * len(window)

    def pair() -> tuple[Tensor, Tensor]:
        up = torch.randn(6, 4, *ones, generator=generator, dtype=torch.float64)
        down = torch.randn(4, 5, *window, generator=generator, dtype=torch.float64)
        return up, down

    pairs = [pair(), pair(), pair()]
    mean = sum(up.flatten(1) @ down.flatten(1) for up, down in pairs) / 3
    values = torch.linalg.svdvals(mean)
    up, down, squares = average_pairs(pairs, 3, rank=2)
    assert up.shape == (6, 2, *ones)
    assert down.shape == (2, 5, *window)
    error = (up.flatten(1) @ down.flatten(1) - mean).norm()
    torch.testing.assert_close(error, values[2:].square().sum().sqrt())
    torch.testing.assert_close(squares[: len(values)], values.square())

    # The mean of the factors is another matrix, and none near it.
    factors = sum(up for up, _ in pairs).flatten(1) @ sum(down for _, down in pairs).flatten(1) / 9
    assert (factors - mean).norm() > 0.5 * mean.norm()


def test_an_adaptor_is_its_own_average(adaptors: list[Path], model_dir: Path, tmp_path: Path):
    made = average_adaptors([adaptors[0], adaptors[0]], tmp_path / "same")
    assert made.error < 1e-6
    (spent,) = read_metadata(made.folder).training
    (each,) = read_metadata(adaptors[0]).training
    assert (spent.steps, spent.hours) == (each.steps, each.hours)  # it was trained once
    known = read_metadata(adaptors[0]).prompts_sha256
    assert read_metadata(made.folder).all_prompts_sha256 == (known,)
    own = merged(model_dir, adaptors[0])
    for name, weight in merged(model_dir, made.folder).items():
        torch.testing.assert_close(weight, own[name], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_averaged_is_refused(adaptors: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        HipaError, match=r"1 adaptor to average\. Expected --average at least twice"
    ):
        average_adaptors(adaptors[:1], out)
    other = tmp_path / "other"
    shutil.copytree(adaptors[1], other)
    record = json.loads((other / METADATA).read_text())
    (other / METADATA).write_text(json.dumps(record | {"timestep": 500}))
    with pytest.raises(HipaError, match="are for another timestep each"):
        average_adaptors([adaptors[0], other], out)
    # The same weights with a schedule that ends in pure noise, whose last alpha_bar is 0.
    (other / METADATA).write_text(json.dumps(record | {"alpha_bar": 0.0}))
    with pytest.raises(HipaError, match=r"noise schedule each: alpha_bar is 0\.00466 and 0 "):
        average_adaptors([adaptors[0], other], out)
    (other / METADATA).write_text(json.dumps(record | {"alpha_bar": record["alpha_bar"] * 1.0001}))
    average_adaptors([adaptors[0], other], tmp_path / "digits")
    (other / METADATA).write_text(json.dumps(record))
    (other / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes()[:-7])
    with pytest.raises(HipaError):
        average_adaptors([adaptors[0], other], out)
    assert not out.exists()


def test_the_command(adaptors: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "average"
    chosen = [text for folder in adaptors for text in ("--average", str(folder))]
    done = CliRunner().invoke(app, ["train", *chosen, "--rank", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out) in done.output.replace("\n", "")
    assert read_metadata(out).rank == 4
    kept = (out / WEIGHTS).read_bytes()
    again = CliRunner().invoke(app, ["train", *chosen, "--out", str(out)])
    assert again.exit_code != 0
    assert (out / WEIGHTS).read_bytes() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--average", "a", "--average", "b", "--steps", "3"], "goes with --out and --rank alone"),
        (["--rank", "3"], "--rank is for --average"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", *options, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, HipaError)
    assert message in str(done.exception)
