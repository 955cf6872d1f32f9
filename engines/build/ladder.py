"""Repairs for an engine that fails its gate, in the order in which they are tried.

0. From the start: the remedies of known faults of this TensorRT and GPU that their public threads
   document, what they cost notwithstanding.
1. Remedies of known faults that are this project's own idea, and those that the user left out.
2. A barrier: the tensor where the stage departs becomes an output, across which TensorRT fuses no
   layers; then the same tensor in every block of this kind, since what TensorRT does wrongly in one
   it does in all.
3. The block in float32; then every block of this kind.
4. Another optimization level, with which TensorRT chooses other kernels.

Each is tried on its own, on top of what the build had from the start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.faults.attention import find_attentions
from hipa_deploy.engines.faults.bisect import Bisection
from hipa_deploy.engines.faults.blocks import Block, find_blocks, weight_names
from hipa_deploy.engines.faults.island import tensors_of_nodes
from hipa_deploy.engines.faults.known_faults import (
    Build,
    KnownFault,
    faults_of,
    find_fault,
    remedies,
)
from hipa_deploy.engines.faults.onnx_graph import Graph, read_graph
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.sidecar import AppliedRemedy

ATTENTION = "attention"  # an island's name that stands for every attention's products
_DEFAULT_LEVEL = 3  # TensorRT's own
_OTHER_LEVELS = (2, 4)
# Each barrier is written to memory in every run, so their number is limited.
_MOST_BARRIERS = 64


@dataclass(frozen=True)
class StageGraph:
    """A stage's graph with its blocks, and the names of its weights."""

    graph: Graph
    blocks: tuple[Block, ...]
    names: Mapping[str, str]

    @classmethod
    def read(cls, bundle: Bundle, stage: str) -> StageGraph:
        """Read the graph of ``stage``.

        Raises:
            HipaError: its file or its weight map is damaged.

        """
        graph = read_graph(bundle.stage_path(stage))
        names = weight_names(bundle, stage)
        return cls(graph, find_blocks(graph, names), names)

    def tensors_of(self, islands: Sequence[str]) -> tuple[str, ...]:
        """The tensors whose nodes compute in float32, for the names of islands."""
        numbers: set[int] = set()
        for block in self.blocks:
            if block.name in islands:
                numbers.update(range(block.first, block.last + 1))
        if ATTENTION in islands:
            for attention in find_attentions(self.graph):
                numbers.update(attention.nodes)
        return tensors_of_nodes(self.graph, numbers)

    def like(self, tensor: str) -> tuple[str, ...]:
        """The tensors that have the place of ``tensor`` in blocks of the same kind; itself too."""
        roles = self._roles()
        role = roles[self.graph.makers()[tensor]]
        found = []
        for number, other in enumerate(roles):
            if other == role:
                found.append(self.graph.nodes[number].outputs[0])
        return tuple(found)

    def _roles(self) -> list[tuple[str, int]]:
        """By node, the weight that was taken last, without numbers, and the steps since then."""
        roles = []
        latest = ""
        steps = 0
        for node in self.graph.nodes:
            steps += 1
            for name in node.inputs:
                place = self.names.get(name, name if name in self.graph.weights else "")
                if "." in place:
                    latest = re.sub(r"\.\d+\.", ".N.", place)
                    steps = 0
            roles.append((latest, steps))
        return roles

    def blocks_like(self, name: str) -> tuple[str, ...]:
        """The blocks of the same kind as the block ``name``; itself too.

        Example:
            >>> stage_graph.blocks_like("unet.down_blocks.0.resnets.1")[0]
            'unet.down_blocks.0.resnets.0'

        """
        kind = _kind(name)
        return tuple(
            dict.fromkeys(block.name for block in self.blocks if _kind(block.name) == kind)
        )


def _kind(block: str) -> str:
    """'resnets' for 'unet.down_blocks.0.resnets.1'; the whole name without such a part."""
    found = re.fullmatch(r".*\.(\w+)\.\d+", block)
    return found.group(1) if found else block


def build_facts(bundle: Bundle, stage: str, key: EngineKey, graph: Graph) -> Build:
    """What decides which known faults a build of ``stage`` meets."""
    batches = []
    for tensor in bundle.all_stages[stage].spec.inputs:
        sizes = tensor.at(bundle.all_stages[stage].spec.sizes("max"))
        # A timestep or a step has one number for the whole batch.
        if len(sizes) > 1:
            batches.append(sizes[0])
    return Build(
        library=key.flavour,
        version=key.tensorrt,
        sms=key.compute_capabilities,
        batch=max(batches, default=1),
        precision=key.precision,
        operators=frozenset(node.operator for node in graph.nodes),
    )


def from_the_start(facts: Build, without: Collection[str] = ()) -> Repairs:
    """The remedies that every such build has: the documented ones of known faults.

    Args:
        facts: about the build.
        without: ids of faults whose remedy is left out.

    """
    return remedies(fault for fault in faults_of(facts, "always") if fault.id not in without)


def applied_remedies(repairs: Repairs) -> tuple[AppliedRemedy, ...]:
    """What ``repairs`` has of the remedies of known faults, with what each costs."""
    found = []
    for name in repairs.known_faults:
        fault = find_fault(name)
        found.append(
            AppliedRemedy(
                fault=fault.id, remedy=fault.remedy, cost=fault.cost, sources=fault.sources
            )
        )
    return tuple(found)


def ladder(
    stage: StageGraph,
    facts: Build,
    start: Repairs,
    level: int | None,
    locate: Callable[[], Bisection],
) -> Iterator[Repairs]:
    """The repairs to try, one after the other.

    Args:
        stage: the stage's graph.
        facts: about the build.
        start: what the build that failed had.
        level: its optimization level; None for TensorRT's own.
        locate: finds where the engine goes wrong; called when the first repairs did not help.

    """
    known = (*faults_of(facts, "always"), *faults_of(facts, "if wrong"))
    untried = [fault for fault in known if fault.id not in start.known_faults]
    if untried:
        yield remedies(untried, start)

    found = locate()
    if found.tensor is not None and found.block is not None:
        one = _barriers(stage, found)
        yield _plus(start, barriers=one)
        # Not where it is the same again, and not so many that the engine would crawl.
        everywhere = tuple(dict.fromkeys(other for name in one for other in stage.like(name)))
        if len(one) < len(everywhere) <= _MOST_BARRIERS:
            yield _plus(start, barriers=everywhere)

        yield _plus(start, islands=(found.block,))
        alike = stage.blocks_like(found.block)
        if len(alike) > 1:
            yield _plus(start, islands=alike)

    for other in _OTHER_LEVELS:
        if other != (_DEFAULT_LEVEL if level is None else level):
            yield start.model_copy(update={"optimization_level": other})


def _barriers(stage: StageGraph, found: Bisection) -> tuple[str, ...]:
    """The tensors to make outputs: the one that mends the stage, or all around a wrong layer."""
    if found.tensor is None:
        return ()
    makers = stage.graph.makers()
    around = [found.tensor]
    if found.verdict == "layer":
        node = stage.graph.nodes[makers[found.tensor]]
        around += [name for name in node.inputs if name in makers]
    inside = [name for name in around if name not in stage.graph.outputs]
    return tuple(name for name in inside if stage.graph.is_floating(name))


def _plus(start: Repairs, barriers: tuple[str, ...] = (), islands: tuple[str, ...] = ()) -> Repairs:
    return start.model_copy(
        update={
            "barriers": tuple(dict.fromkeys((*start.barriers, *barriers))),
            "islands": tuple(dict.fromkeys((*start.islands, *islands))),
        }
    )


def advice(facts: Build, error: str | None = None) -> tuple[str, ...]:
    """What is known of such a build and cannot be mended in it, in words.

    Args:
        facts: about the build.
        error: with which the build failed; None if it did not fail, and the engine is wrong.

    """
    found = [fault for fault in faults_of(facts, "tell") if _explains(fault, error)]
    return tuple(f"{fault.symptom} {fault.remedy} ({', '.join(fault.sources)})" for fault in found)


def _explains(fault: KnownFault, error: str | None) -> bool:
    if error is None or fault.error is None:
        return error is None and fault.error is None
    return re.search(fault.error, error) is not None
