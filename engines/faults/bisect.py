"""Where a stage goes wrong: the first block, and in it the first node, that departs.

A wrong tensor makes those after it wrong too, so the first one is found by halving: some 5 runs for
the blocks of Stable Diffusion's UNet, some 6 for the nodes of a block. Each run makes a single
tensor an output, because TensorRT fuses no layers across an output. So a run has two answers:
whether this tensor is right, and whether the stage's output is right with that tensor as an output.
Where the output becomes right, the fault is a fusion across that tensor (as in
https://github.com/NVIDIA/TensorRT-Edge-LLM/issues/151).

The reference computes in float32. How far a float16 tensor may be from it depends on the tensor: in
a residual stream with a few huge values an error hides that the last layer brings out. So a third
run, the graph as it is on a processor that is right, says what is usual, and a tensor is wrong
where the suspect's is further away by ``MARGIN_DB``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from rich.table import Table

from hipa_deploy.bundle.parity import compare
from hipa_deploy.engines.faults.blocks import Block, block_at
from hipa_deploy.engines.faults.onnx_graph import Graph
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

Run = Callable[[tuple[str, ...]], Mapping[str, np.ndarray]]
"""Runs a stage on fixed inputs with some of its tensors made outputs; gives all outputs by name."""

# 12 dB: four times the usual error.
MARGIN_DB = 12.0
# In float32 the usual run may be exact. 70 dB are 0.03 % of a tensor's range.
MOST_USUAL_DB = 70.0

Verdict = Literal["right", "layer", "fusion"]


class Probe(Record):
    """A run with one tensor made an output; or with none, where ``tensor`` is None.

    Attributes:
        tensor: the tensor.
        block: the block that makes it.
        operator: of the node that makes it.
        psnr_db: how near it is to the reference, in dB; None for NaN, infinity or another shape.
        least_psnr_db: what counts as right for this tensor.
        right: whether that is near enough.
        output_psnr_db: the same of the stage's output, in this run.
        output_right: whether that is near enough.

    """

    tensor: str | None
    block: str | None
    operator: str | None
    psnr_db: float | None
    least_psnr_db: float
    right: bool
    output_psnr_db: float | None
    output_right: bool


class Bisection(Record):
    """What ``bisect`` found.

    Attributes:
        stage: the stage's name.
        verdict: 'right' (nothing departs), 'layer' (a layer gives wrong numbers), or 'fusion' (the
            output is right as soon as ``tensor`` is made an output).
        block: the first block that departs.
        operator: the ONNX operator of the first node in it that departs.
        node: that node's name.
        tensor: its output.
        least_psnr_db: what counts as right for the stage's outputs, in dB.
        probes: every run, in order.

    """

    stage: str
    verdict: Verdict
    block: str | None = None
    operator: str | None = None
    node: str | None = None
    tensor: str | None = None
    least_psnr_db: float
    probes: tuple[Probe, ...]

    def __str__(self) -> str:
        if self.verdict == "right":
            return f"{self.stage}: the output agrees with the reference."
        if self.verdict == "fusion":
            return (
                f"{self.stage}: a fusion across {self.tensor} ({self.operator} in {self.block}) is "
                "wrong: with that tensor as an output, the stage is right."
            )
        return (
            f"{self.stage}: the first wrong tensor is {self.tensor} ({self.operator} in "
            f"{self.block})."
        )


def bisect(
    stage: str,
    graph: Graph,
    blocks: Sequence[Block],
    suspect: Run,
    reference: Run,
    usual: Run,
    least_psnr_db: float,
) -> Bisection:
    """Find where ``suspect`` departs from ``reference``; all run the same graph and inputs.

    Args:
        stage: the stage's name.
        graph: the graph of both.
        blocks: the graph's blocks.
        suspect: what is wrong; each call may take a build.
        reference: what is right, in float32.
        usual: what is right in the types of the graph; it says how large an error is usual.
        least_psnr_db: the gate of the stage's outputs.

    Raises:
        HipaError: a run fails.

    Example:
        >>> bisect("unet", graph, blocks, engine, in_float32, as_it_is, 35.0).block
        'unet.down_blocks.0.resnets.1'

    """
    search = _Search(graph, tuple(blocks), suspect, reference, usual, least_psnr_db)
    whole = search.probe(None)
    if whole.output_right:
        return Bisection(stage=stage, verdict="right", least_psnr_db=least_psnr_db, probes=(whole,))

    # Among the blocks' ends, then among the tensors inside of the block.
    ends = [block.tensor for block in blocks]
    search.expect(ends)
    wrong = search.first_wrong(ends)
    if search.mended_by is None:
        wrong = search.first_wrong(search.tensors_of(block_at(tuple(blocks), search.maker(wrong))))
    if search.mended_by is None:
        wrong = search.source(wrong)

    tensor = search.mended_by or wrong
    number = search.maker(tensor)
    return Bisection(
        stage=stage,
        verdict="fusion" if search.mended_by else "layer",
        block=block_at(tuple(blocks), number).name,
        operator=graph.nodes[number].operator,
        node=graph.nodes[number].name,
        tensor=tensor,
        least_psnr_db=least_psnr_db,
        probes=tuple(search.probes.values()),
    )


@dataclass
class _Search:
    """The runs of one bisection; none is made twice."""

    graph: Graph
    blocks: tuple[Block, ...]
    suspect: Run
    reference: Run
    usual: Run
    least_psnr_db: float
    probes: dict[str | None, Probe] = field(default_factory=dict)
    # The tensor that made the output right when it was made an output itself.
    mended_by: str | None = None
    # Of the reference and of the usual run, what was asked for in one go.
    _expected: dict[str, np.ndarray] = field(default_factory=dict)
    _usual: dict[str, np.ndarray] = field(default_factory=dict)
    _makers: dict[str, int] = field(default_factory=dict)

    def expect(self, tensors: Sequence[str]) -> None:
        """Run reference and usual run once for all of ``tensors``, which are few and small."""
        inside = tuple(name for name in tensors if name not in self.graph.outputs)
        self._expected.update(self.reference(inside))
        self._usual.update(self.usual(inside))

    def maker(self, tensor: str) -> int:
        """The number of the node that makes a tensor."""
        if not self._makers:
            self._makers = self.graph.makers()
        return self._makers[tensor]

    def tensors_of(self, block: Block) -> list[str]:
        """The floating-point tensors of a block, in the order in which they are made."""
        found = []
        for node in self.graph.nodes[block.first : block.last + 1]:
            found += [name for name in node.outputs if name and self.graph.is_floating(name)]
        return found

    def first_wrong(self, tensors: Sequence[str]) -> str:
        """Halve ``tensors``, whose last one is taken for wrong, down to the first wrong one."""
        low = 0
        high = len(tensors) - 1
        while low < high and self.mended_by is None:
            middle = (low + high) // 2
            if self.probe(tensors[middle]).right:
                low = middle + 1
            else:
                high = middle
        return tensors[low]

    def source(self, tensor: str) -> str:
        """Go from a wrong tensor to what it was made from, as long as that is wrong too.

        Halving alone may miss a branch: of query, key and value, one may be wrong and the next in
        the file right.
        """
        while self.mended_by is None:
            wrong = None
            for name in self.graph.nodes[self.maker(tensor)].inputs:
                is_made = name in self._makers and self.graph.is_floating(name)
                if wrong is None and is_made and not self.probe(name).right:
                    wrong = name
            if wrong is None:
                break
            tensor = wrong
        return tensor

    def probe(self, tensor: str | None) -> Probe:
        """Run both with ``tensor`` made an output, and compare it and the stage's outputs."""
        if tensor in self.probes:
            return self.probes[tensor]
        # An output of the graph cannot be made an output again.
        is_inside = tensor is not None and tensor not in self.graph.outputs
        marks = (tensor,) if tensor is not None and is_inside else ()
        got = self.suspect(marks)
        is_known = tensor is None or tensor in self._expected
        expected = self._expected if self._expected and is_known else self.reference(marks)

        output_db = self._least(got, expected, self.graph.outputs)
        tensor_db = output_db
        least_db = self.least_psnr_db
        if tensor is not None:
            tensor_db = self._least(got, expected, (tensor,))
            usual = self._usual if is_known else self.usual(marks)
            usual_db = self._least(usual, expected, (tensor,))
            if is_inside and usual_db is not None:
                least_db = min(usual_db, MOST_USUAL_DB) - MARGIN_DB
        number = None if tensor is None else self.maker(tensor)
        found = Probe(
            tensor=tensor,
            block=None if number is None else block_at(self.blocks, number).name,
            operator=None if number is None else self.graph.nodes[number].operator,
            psnr_db=tensor_db,
            least_psnr_db=least_db,
            right=_reaches(tensor_db, least_db),
            output_psnr_db=output_db,
            output_right=_reaches(output_db, self.least_psnr_db),
        )
        self.probes[tensor] = found
        if is_inside and found.right and found.output_right:
            self.mended_by = tensor
        return found

    def _least(
        self,
        got: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
        names: Sequence[str],
    ) -> float | None:
        """The lowest PSNR among some tensors, in dB; None where one cannot be compared."""
        least = None
        for name in names:
            if name not in got or name not in expected:
                raise HipaError(
                    f"tensor {name!r} was made an output and did not come back. "
                    "Report it with hipa-doctor --self-test."
                )
            distance = distance_db(got[name], expected[name])
            if distance is None:
                return None
            least = distance if least is None else min(least, distance)
        return least


def _reaches(psnr_db: float | None, least_db: float) -> bool:
    return psnr_db is not None and psnr_db >= least_db


def distance_db(got: np.ndarray, expected: np.ndarray) -> float | None:
    """PSNR of ``got`` in dB; None for another shape, or NaN or infinity of its own."""
    if got.shape != expected.shape:
        return None
    # An infinity that both have, as in the mask of a text encoder, is no error.
    finite = np.isfinite(expected.astype(np.float32))
    same_elsewhere = np.array_equal(got[~finite], expected[~finite], equal_nan=True)
    if not same_elsewhere or not np.isfinite(got[finite].astype(np.float32)).all():
        return None
    if not finite.any():
        return compare(np.zeros(1), np.zeros(1)).psnr_db
    return compare(got[finite].ravel(), expected[finite].ravel()).psnr_db


def render_bisection(found: Bisection) -> Table:
    """The runs as a table for a terminal, and what they come to."""
    table = Table(title=f"Where {found.stage} goes wrong", caption=str(found))
    headings = ("tensor made an output", "block", "operator", "it, dB", "needs", "output, dB")
    for heading in headings:
        table.add_column(heading)
    for probe in found.probes:
        table.add_row(
            probe.tensor or "none",
            probe.block or "-",
            probe.operator or "-",
            "-" if probe.tensor is None else _decibels(probe.psnr_db, probe.right),
            "-" if probe.tensor is None else f"{probe.least_psnr_db:.1f}",
            _decibels(probe.output_psnr_db, probe.output_right),
        )
    return table


def _decibels(value: float | None, right: bool) -> str:
    colour = "green" if right else "red"
    return f"[{colour}]{'not comparable' if value is None else f'{value:.1f}'}[/]"
