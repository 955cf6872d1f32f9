"""The average of several adaptors as one adaptor, which costs no more to run.

An adaptor adds scale B A to a layer's weights. The mean of several such differences is not the
product of the mean B and the mean A: that has every B_i A_j of two different adaptors in it, which
no training ever saw. So the differences themselves are averaged, and the nearest adaptor of the
wanted rank is found by a singular value decomposition (Eckart & Young 1936). What it leaves out is
stated. The mean of n adaptors of rank r has a rank of at most n r, with which nothing is left out.

An average over the steps of one training (ema_decay) is another thing: there the factors change
little from one step to the next, and averaging them as they are is what SwiftBrush v2 (2408.14176)
and diffusers' EMAModel do with weights. Tang et al. 2025, 'LoRA Merging with SVD', compare both
ways of averaging across trainings.

Shape suffixes: O outputs, I inputs of a layer (of a convolution, times its window), R ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hipa_deploy.disk.files import new_folder, refuse_to_overwrite
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    METADATA,
    WEIGHTS,
    AdaptorMetadata,
    weights_sha256,
)
from hipa_deploy.models.weights.weight_file import load_tensors
from hipa_deploy.train.average_request import check_average
from hipa_deploy.train.loop.spent import summed
from hipa_deploy.train.model.encoder_adaptor import check_storable, finish_file
from hipa_deploy.train.model.unet_adaptor import stored_dtype

DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
CONFIG = "lora_adapter_metadata"  # diffusers' name of the LoRA configuration in a file's header


@dataclass(frozen=True)
class Average:
    """An averaged adaptor.

    Attributes:
        folder: Where it is.
        rank: Its rank; a layer of fewer inputs or outputs has as many as it can.
        error: Frobenius norm of what the rank left out, over that of the exact average, of all
            layers together. 0 where nothing was left out.

    """

    folder: Path
    rank: int
    error: float


def average_adaptors(folders: Sequence[Path], out: Path, rank: int | None = None) -> Average:
    """Write the average of adaptors to the new folder ``out``.

    It is stored in float16 where all of them are, else in float32.

    Args:
        folders: Two or more adaptor folders, for the same model, task and timestep. They may have
            other ranks, layers, losses, seeds or prompts: a layer that one lacks counts as
            unchanged there. One that is given twice weighs twice as much.
        out: The folder to write. It appears whole or not at all.
        rank: Rank of the average; the largest of the adaptors' own if None.

    Raises:
        HipaError: fewer than two adaptors, adaptors that do not go together or are damaged, an
            average that is not finite as it is stored, or an ``out`` that is not empty.

    Example:
        >>> average_adaptors([Path("seed-0"), Path("seed-1")], Path("both")).error
        0.13

    """
    refuse_to_overwrite(out)
    metadata = check_average(folders)
    if rank is None:
        rank = max(record.rank for record in metadata)

    files = [WEIGHTS]
    if metadata[0].encoder_rank:
        files.append(ENCODER_WEIGHTS)
    averaged = {}
    left_out = 0.0
    whole = 0.0
    for file in files:
        layers = [_layers(folder / file) for folder in folders]
        averaged[file], file_left_out, file_whole = _average_layers(layers, rank)
        left_out += file_left_out
        whole += file_whole
    error = (left_out / whole) ** 0.5 if whole else 0.0

    dtype = torch.float16
    for each in metadata:
        dtype = torch.promote_types(dtype, stored_dtype(each))
    for tensors in averaged.values():
        check_storable(tensors, dtype)

    hashes = [weights_sha256(folder) for folder in folders]
    about = {"adaptors": hashes, "rank": rank, "left_out": error}
    prompts = dict.fromkeys(each for one in metadata for each in one.all_prompts_sha256)
    # One that is given several times, so that it weighs more, was trained once.
    distinct = dict(zip(hashes, metadata, strict=True)).values()
    recipe = metadata[0].recipe
    stored = {**recipe.get("adaptor", {}), "dtype": str(dtype).removeprefix("torch.")}
    record = metadata[0].model_copy(
        update={
            "rank": rank,
            "alpha": float(rank),
            "targets": _targets(metadata),
            "encoder_rank": rank if metadata[0].encoder_rank else 0,
            "steps_trained": max(each.steps_trained for each in metadata),
            "initial_sha256": None,
            "earlier_prompts_sha256": tuple(prompts),
            "training": summed([entry for each in distinct for entry in each.training]),
            "recipe": {**recipe, "adaptor": stored, "average": about},
        }
    )
    with new_folder(out) as scratch:
        for file, tensors in averaged.items():
            path = scratch / file
            save_file(tensors, path, metadata=_header(folders[0] / file, rank, tensors))
            finish_file(path, dtype)
        shutil.copytree(folders[0] / "scheduler", scratch / "scheduler")
        (scratch / METADATA).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Average(out, rank, error)


def _layers(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> B times its scale, and A, as stored.

    Raises:
        HipaError: the file is damaged, or holds other tensors than pairs of matrices.

    """
    tensors = load_tensors(path)
    config = _config(path)
    layers = {}
    for name, down in tensors.items():
        if not name.endswith(DOWN):
            continue
        layer = name.removesuffix(DOWN)
        up = tensors.get(layer + UP)
        if up is None:
            raise HipaError(f"adaptor {path}: layer {layer} has no {UP[1:]}. Copy it again.")
        scale = config.get("lora_alpha", down.shape[0]) / config.get("r", down.shape[0])
        layers[layer] = (up.double() * scale, down.double())
    if 2 * len(layers) != len(tensors):
        raise HipaError(f"adaptor {path} is no plain LoRA. Expected one of hipa-train.")
    return layers


def _average_layers(
    adaptors: list[dict[str, tuple[Tensor, Tensor]]], rank: int
) -> tuple[dict[str, Tensor], float, float]:
    """The averaged tensors by name, and the squared norms of what is left out and of the whole."""
    names = dict.fromkeys(name for adaptor in adaptors for name in adaptor)
    tensors = {}
    left_out = 0.0
    whole = 0.0
    for name in names:
        pairs = [adaptor[name] for adaptor in adaptors if name in adaptor]
        up, down, squares = average_pairs(pairs, len(adaptors), rank)
        tensors[name + UP] = up.float().contiguous()
        tensors[name + DOWN] = down.float().contiguous()
        left_out += float(squares[rank:].sum())
        whole += float(squares.sum())
    return tensors, left_out, whole


def average_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]], count: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest pair of matrices to the mean of the products of several pairs.

    Args:
        pairs: (B, A) of each adaptor that has the layer, float64: [O, R] and [R, I], or of a
            convolution [O, R, 1, 1] and [R, I, height, width].
        count: How many adaptors the mean is over.
        rank: Of the result.

    Returns:
        B and A of the result, padded with zeros up to the rank, and the squared singular values of
        the mean, in descending order.

    """
    up_shape = pairs[0][0].shape
    down_shape = pairs[0][1].shape
    # Side by side and one above the other, their product is the sum of all products.
    up_OR = torch.cat([up.flatten(1) for up, _ in pairs], dim=1) / count
    down_RI = torch.cat([down.flatten(1) for _, down in pairs])

    # The product itself may be large; its singular values are those of the small middle matrix.
    q_OR, r_RR = torch.linalg.qr(up_OR)
    q_IR, l_RR = torch.linalg.qr(down_RI.T)
    u_RR, values_R, v_RR = torch.linalg.svd(r_RR @ l_RR.T)
    kept = min(rank, len(values_R))
    root_R = values_R[:kept].sqrt()
    up = torch.zeros(up_shape[0], rank, dtype=torch.float64)
    down = torch.zeros(rank, down_RI.shape[1], dtype=torch.float64)
    up[:, :kept] = q_OR @ u_RR[:, :kept] * root_R
    down[:kept] = root_R[:, None] * (v_RR[:kept] @ q_IR.T)
    up = up.reshape(up_shape[0], rank, *up_shape[2:])
    down = down.reshape(rank, *down_shape[1:])
    return up, down, values_R.square()


def _targets(metadata: list[AdaptorMetadata]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target for record in metadata for target in record.targets))


def _config(path: Path) -> dict[str, Any]:
    """The LoRA configuration in a file's header, if any, without the part's name."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(CONFIG, "{}")
    return {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}


def _header(path: Path, rank: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The first adaptor's header, with the rank, scale and layers of the average."""
    with safe_open(path, "pt") as file:
        header = dict(file.metadata() or {})
    config = json.loads(header.get(CONFIG, "{}"))
    layers = sorted(name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN))
    for key in config:
        part, _, name = key.rpartition(".")
        if name in ("r", "lora_alpha"):
            config[key] = rank
        if name == "target_modules":
            config[key] = [layer.removeprefix(f"{part}.") for layer in layers]
    header[CONFIG] = json.dumps(config, indent=2, sort_keys=True)
    return header
