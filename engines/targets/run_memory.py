"""What a run takes in memory for weights and activations, in MiB, and how little it can.

The plan of a build and ``--low-memory`` both ask here, so that one predicts what the other does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hipa_deploy.record import Record

TEXT_STAGES = ("text_encoder", "text_encoder_2")  # SDXL has two in the generic layout

# What the activations of an engine take, of what they take in its graph with fused attention, and
# at least. Engines of TensorRT-RTX 1.7 take 0.9 to 1.41 times as much for the stages of SD 1.5, and
# 8 to 32 MiB where the graph takes less (benchmarks/engine_memory.py).
ENGINE_ACTIVATIONS = 1.45
LEAST_ACTIVATIONS_MIB = 32

Groups = tuple[tuple[str, ...], ...]
"""Names of stages; those of one group are loaded together, and one group at a time."""


def engine_activations_mib(graph_bytes: int) -> int:
    """MiB that an engine's activations take, predicted from the bytes that its graph's take."""
    return max(LEAST_ACTIVATIONS_MIB, math.ceil(ENGINE_ACTIVATIONS * graph_bytes / 2**20))


class StageSize(Record):
    """What one stage holds while it is loaded, in MiB.

    Attributes:
        stage: its name.
        weights: its engine, or its ONNX files where there is no engine yet.
        activations: the most that its activations take at once; None where that is not known, and
            then nothing is counted for them.

    """

    stage: str
    weights: int
    activations: int | None


def with_own_activations(sizes: Sequence[StageSize]) -> int:
    """All stages loaded, each with activations of its own, as a context has them by default."""
    return sum(size.weights + (size.activations or 0) for size in sizes)


def with_shared_activations(sizes: Sequence[StageSize]) -> int:
    """All stages loaded, their activations in one block: how ``TensorRTRunner`` has them."""
    largest = max((size.activations or 0 for size in sizes), default=0)
    return sum(size.weights for size in sizes) + largest


def one_group_at_a_time(sizes: Sequence[StageSize], groups: Groups) -> int:
    """The most that one group of stages takes while no other is loaded."""
    by_name = {size.stage: size for size in sizes}
    return max(with_shared_activations([by_name[name] for name in group]) for group in groups)


def low_memory_groups(sizes: Sequence[StageSize], room: int | None) -> Groups:
    """How low-memory mode groups the stages, in the order in which they run.

    A text encoder is always apart: it runs only for a new prompt. All others stay loaded together
    for the next image, unless they do not fit. Then each is loaded by itself, at every image.

    Args:
        sizes: of every stage, in the order in which they run.
        room: MiB for weights and activations; None where that is not known, which is enough.

    Example:
        >>> sizes = [
        ...     StageSize(stage="text_encoder", weights=235, activations=2),
        ...     StageSize(stage="unet", weights=1640, activations=150),
        ...     StageSize(stage="vae_decoder", weights=95, activations=400),
        ... ]
        >>> low_memory_groups(sizes, 4000)
        (('text_encoder',), ('unet', 'vae_decoder'))
        >>> low_memory_groups(sizes, 2000)
        (('text_encoder',), ('unet',), ('vae_decoder',))

    """
    text = [size for size in sizes if size.stage in TEXT_STAGES]
    others = [size for size in sizes if size.stage not in TEXT_STAGES]
    groups = [(size.stage,) for size in text]
    if room is None or with_shared_activations(others) <= room:
        return (*groups, tuple(size.stage for size in others))
    return (*groups, *((size.stage,) for size in others))
