"""What share of the roofline Stable Diffusion 1.5 can reach at 512 pixels on each target.

    python benchmarks/small_grids.py

It prints a Markdown table. It is a prediction from shapes: no weights are made, and nothing is
timed. The layers are those that diffusers runs, recorded
on torch's 'meta' device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional

from hipa_deploy.engines.faults.products import Product
from hipa_deploy.engines.latency.roofline import layer_by_layer, peak_of
from hipa_deploy.engines.targets.target import load_target_profile, target_names

HALF = 2  # bytes of a weight
BATCHES = (1, 4)


def record(run: Callable[[], Any], model: torch.nn.Module) -> list[Product]:
    """Every matrix product of ``run``, which calls ``model``."""
    products = []

    def convolution(module: Any, inputs: Any, output: torch.Tensor) -> None:
        weight = module.weight
        pixels = output.shape[0] * output.shape[2] * output.shape[3]
        products.append(
            Product(1, pixels, weight.shape[0], weight[0].numel(), weight.numel() * HALF)
        )

    def linear(module: Any, inputs: Any, output: torch.Tensor) -> None:
        columns, rows = module.weight.shape
        tokens = output.numel() // columns
        products.append(Product(1, tokens, columns, rows, module.weight.numel() * HALF))

    def attention(query: Any, key: Any, value: Any, *args: Any, **more: Any) -> torch.Tensor:
        heads = query.shape[0] * query.shape[1]
        length, size = query.shape[2:]
        products.append(Product(heads, length, key.shape[2], size))
        products.append(Product(heads, length, size, key.shape[2]))
        return torch.empty_like(query)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
    real = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        run()
    finally:
        functional.scaled_dot_product_attention = real
    return products


def unet_products(batch: int) -> list[Product]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        noise = torch.empty(batch, 4, 64, 64)
        timestep = torch.empty(batch)
        context = torch.empty(batch, 77, 768)
    return record(lambda: unet(noise, timestep, context), unet)


def decoder_products(batch: int) -> list[Product]:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        latents = torch.empty(batch, 4, 64, 64)
    return record(lambda: vae.decode(latents), vae)


def row(name: str, stage: str, batch: int, products: Sequence[Product]) -> str | None:
    """A line of the table; None for a target whose rates or multiprocessors are not known."""
    profile = load_target_profile(name)
    peak = peak_of(profile, "fp16")
    if peak is None or profile.sm_count is None:
        return None
    flops = sum(product.flops for product in products)
    weights = sum(product.weight_bytes for product in products)
    bound_ms = max(flops / peak.tflops / 1e9, weights / peak.bandwidth_gb_s / 1e6)
    reachable_ms, busy = layer_by_layer(products, peak, profile.sm_count)
    return (
        f"| {profile.title} | {stage} | {batch} | {bound_ms:.2f} | {reachable_ms:.2f} | "
        f"{busy:.0f} % | {100 * bound_ms / reachable_ms:.0f} % |"
    )


def main() -> None:
    print("| device | stage | batch | bound ms | reachable ms | busy | of the bound at best |")
    print("|---|---|---|---|---|---|---|")
    for stage, make in (("UNet", unet_products), ("full decoder", decoder_products)):
        for batch in BATCHES:
            products = make(batch)
            for name in target_names():
                line = row(name, stage, batch, products)
                if line:
                    print(line)


if __name__ == "__main__":
    main()
