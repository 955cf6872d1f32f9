"""The least that a workload takes on this card: its operations and bytes at the measured rates.

Every stage does the operations of its convolutions and matrix products once, and reads its weights
and inputs and writes its outputs once. Nothing is faster than that at the rates that ``rates.py``
measured, but for weights that stay in the cache from one query to the next. Stages run one after
another, so their bounds add up.

Shapes: B images of a batch, C channels, H W of an image, h w of the latents, L tokens, D width of
the text context.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.gpu.figures import Fact, read_part
from benchmarks.gpu.rates import COPY, MATMUL
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.tasks import Task

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}  # of a value


@dataclass(frozen=True)
class StageCost:
    """One stage of one batch: operations, and the bytes that must cross the memory bus."""

    flops: int
    bytes: int


def workload_costs(
    model_dir: Path, task: Task, batch: int, *, tiny_decoder: bool, precision: str
) -> dict[str, StageCost]:
    """The cost of each stage for a batch, counted on tensors without values.

    Args:
        model_dir: Diffusers folder; its configurations are read.
        task: what is computed; all but 'generate' encode an image too.
        batch: images.
        tiny_decoder: an AutoencoderTiny of TAESD's shape decodes.
        precision: of weights and values, a key of ``BYTES``.

    """
    # On the meta device tensors have shapes and no values: nothing is loaded or computed.
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**_config(model_dir, "text_encoder")))
        unet: Any = UNet2DConditionModel.from_config(_config(model_dir, "unet"))
        vae: Any = AutoencoderKL.from_config(_config(model_dir, "vae"))
        size = unet.config.sample_size
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.empty(batch, unet.config.in_channels, size, size)
        images = torch.empty(batch, 3, factor * size, factor * size)
        length = text_encoder.config.max_position_embeddings
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        context = torch.empty(batch, length, text_encoder.config.hidden_size)
        time_step = torch.zeros(batch, dtype=torch.int64)

        calls: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
            "text_encoder": (text_encoder, (tokens,))
        }
        if task != "generate":
            calls["vae_encoder"] = (vae.encoder, (images,))
        calls["unet"] = (unet, (latents, time_step, context))
        calls["vae_decoder"] = (vae.decoder, (latents,))
        if tiny_decoder:
            calls["vae_decoder"] = (AutoencoderTiny().decoder, (latents,))
        outputs = {
            "text_encoder": context.numel(),
            "vae_encoder": latents.numel(),
            "unet": latents.numel(),
            "vae_decoder": images.numel(),
        }
        costs = {}
        for name, (module, inputs) in calls.items():
            costs[name] = _stage_cost(module, inputs, outputs[name], BYTES[precision])
    return costs


def _config(model_dir: Path, part: str) -> dict[str, Any]:
    path = model_dir / part / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


@torch.no_grad()
def _stage_cost(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], output_values: int, value_bytes: int
) -> StageCost:
    counter = FlopCounterMode(display=False)
    with counter:
        module(*inputs)
    # Of a table of words only the rows that the prompt names are read, which are few.
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    values = sum(weight.numel() for weight in module.parameters())
    values -= sum(table.weight.numel() for table in tables)
    values += sum(tensor.numel() for tensor in inputs) + output_values
    return StageCost(counter.get_total_flops(), value_bytes * values)


@dataclass(frozen=True)
class MeasuredRates:
    """The rates of ``rates.py`` that bounds divide by: operations and bytes a second."""

    flops_per_second: float
    bytes_per_second: float

    def bound_ms(self, costs: dict[str, StageCost]) -> float:
        """The least milliseconds of a batch: the larger of the two in each stage, added up."""
        total = 0.0
        for cost in costs.values():
            total += max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)
        return 1e3 * total


def measured_rates(out: Path, precision: str) -> MeasuredRates | None:
    """The rates in the data file of ``rates.py``; None if it lacks one of the two."""
    result = read_part(out, "rates")
    rates = {figure.name: figure.per_second for figure in result.figures} if result else {}
    flops = rates.get(f"{MATMUL}, {precision}")
    moved = rates.get(COPY)
    if not flops or not moved:
        return None
    return MeasuredRates(flops * 1e12, moved * 1e9)


def bundle_costs(bundle: Bundle) -> dict[str, StageCost]:
    """The cost of each stage of a bundle, as its export counted it in the graphs.

    They are fewer operations than PyTorch's where the export folded some away. Empty for a bundle
    that was exported without costs.
    """
    costs = {}
    for stage in bundle.manifest.stages:
        if stage.cost is None:
            return {}
        moved = stage.cost.weight_bytes + stage.cost.io_bytes
        costs[stage.spec.name] = StageCost(stage.cost.flops, moved)
    return costs


def share_facts(
    out: Path, p50_ms: float, costs: dict[str, StageCost], precision: str
) -> dict[str, Fact]:
    """How near a figure comes to its bound: 'bound_ms', and 'share_percent' of it reached.

    Empty where the rates were not measured, or the costs are not known.
    """
    rates = measured_rates(out, precision)
    if rates is None or not costs:
        return {}
    bound = rates.bound_ms(costs)
    return {"bound_ms": round(bound, 4), "share_percent": round(100 * bound / p50_ms, 2)}
