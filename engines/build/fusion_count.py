"""How many attentions of a stage an engine computes in one kernel each, and why not more."""

from __future__ import annotations

import warnings

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.build.ladder import StageGraph
from hipa_deploy.engines.faults.attention import Attention, find_attentions
from hipa_deploy.engines.faults.blocks import block_at
from hipa_deploy.engines.faults.onnx_graph import FLOAT16
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.sidecar import AttentionCount


def count_attentions(
    bundle: Bundle, stage: str, graph: StageGraph, key: EngineKey, fused: int | None
) -> AttentionCount | None:
    """Count the attentions of a stage's engine, and warn if fusion was lost.

    Returns:
        None for a stage without attention.

    """
    attentions = find_attentions(graph.graph)
    if not attentions:
        return None
    widened = set(graph.tensors_of((key.repairs or Repairs()).islands))
    fusable = 0
    islands: list[str] = []
    for attention in attentions:
        inside = {graph.graph.nodes[number].outputs[0] for number in attention.nodes}
        if not widened & inside and attention.can_be_fused(min(key.compute_capabilities)):
            fusable += 1
        elif key.precision == "fp16":
            islands += _islands_at(bundle, stage, graph, attention, key, bool(widened & inside))
    count = AttentionCount(
        in_graph=len(attentions),
        fusable=fusable,
        fused=fused,
        islands=tuple(dict.fromkeys(islands)),
    )
    _warn_of_lost_fusion(stage, count)
    return count


def _islands_at(
    bundle: Bundle,
    stage: str,
    graph: StageGraph,
    attention: Attention,
    key: EngineKey,
    repaired: bool,
) -> list[str]:
    """The float32 parts that keep an attention from being fused, by their names."""
    if repaired:
        return list(key.repairs.islands) if key.repairs else []
    # One that is in float16 throughout is kept from it by its heads' size.
    if set(attention.elements) <= {FLOAT16}:
        return []
    block = block_at(graph.blocks, attention.nodes[0]).name
    named = bundle.all_stages[stage].fp32_islands
    inside = [name for name in named if name.startswith(block) or block.startswith(name)]
    return inside or [block]


def _warn_of_lost_fusion(stage: str, count: AttentionCount) -> None:
    if count.islands:
        warnings.warn(
            f"{stage}: {count.in_graph - count.fusable} of {count.in_graph} attentions cannot be "
            f"fused, which costs time: float32 in {', '.join(count.islands)}.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif count.fused is not None and count.fused < count.fusable:
        warnings.warn(
            f"{stage}: TensorRT fused {count.fused} attentions of {count.fusable} that it could, "
            "which costs time. Another --optimization-level may fuse more.",
            RuntimeWarning,
            stacklevel=2,
        )
