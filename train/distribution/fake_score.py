"""The fake score's adaptor: a second one on the student's frozen UNet.

Switched on, it turns the UNet into a model of the student's images; switched off, the UNet is the
teacher or the student. peft keeps both adaptors in one module, so a training needs the UNet once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from hipa_deploy.train.model.encoder_adaptor import ADAPTER
from hipa_deploy.train.model.unet_adaptor import FULL

FAKE = "fake"  # peft's name of it
SEED_OFFSET = 1  # its A matrices are not the student's


def add_fake_score(unet: Any, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Add the second adaptor to a UNet that has the student's, in place; the student's stays on.

    It has every layer of the preset full, whatever layers the student's has: it must follow the
    student over all timesteps. It starts as the frozen model's own score, as its B matrices are
    zero.

    Args:
        unet: The UNet2DConditionModel, after ``add_adaptor``.
        rank: Rank of the second adaptor; its scale is 1.
        seed: Of the recipe.

    Returns:
        Its weights by name.

    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(FULL))
    with torch.random.fork_rng():
        torch.manual_seed(seed + SEED_OFFSET)
        with warnings.catch_warnings():
            # peft warns of a second adaptor, which is what is wanted.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            unet.add_adapter(config, FAKE)

    # Adding it switched it on.
    unet.set_adapter(ADAPTER)
    return fake_weights(unet)


def fake_weights(unet: Any) -> dict[str, nn.Parameter]:
    """The weights of the second adaptor by name."""
    return {name: weight for name, weight in unet.named_parameters() if f".{FAKE}." in name}


@contextmanager
def as_fake_score(unet: Any) -> Iterator[None]:
    """Switch to the second adaptor inside the block, and back to the student's.

    peft lets the weights of the active adaptor alone have a gradient. So a backward pass of the
    fake score belongs inside the block, and one of the student outside of it.
    """
    unet.set_adapter(FAKE)
    try:
        yield
    finally:
        unet.set_adapter(ADAPTER)
