"""A module and its references -> an ONNX stage that is checked against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hipa_deploy.bundle.manifest import Parity, Precision, Stage, StageSpec
from hipa_deploy.bundle.parity import compare, problem
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.export.generic.generic_pair import TEXT_PARTS
from hipa_deploy.export.graph.graph_cost import stage_cost
from hipa_deploy.export.graph.half_precision import (
    fewest_islands,
    islands_by_range,
    to_half,
    whole_attentions,
)
from hipa_deploy.export.graph.modules import place_of
from hipa_deploy.export.graph.run_apart import run_all_apart
from hipa_deploy.export.graph.to_onnx import OPSET, export_stage
from hipa_deploy.export.model_parts import free_memory
from hipa_deploy.export.references import References, strength_key


@dataclass(frozen=True)
class StageSource:
    """What a stage is made of.

    Attributes:
        name: of the stage, and of its folder in the bundle.
        build: loads, merges and folds the stage's module, in float32. It is called once more if
            float16 turns out not to be faithful: the module lives only while it is exported, so
            that the model is never in memory twice.
        inputs: keys of the tensors that it takes, in the order of the stage's inputs.
        output: key of the tensor that it gives.
        also: keys of further tensors that it gives, in the order of the stage's outputs.

    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    output: str
    also: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Keys of all that it gives."""
        return (self.output, *self.also)


class WrittenStage(NamedTuple):
    """A stage of the manifest, and what it gave for the reference, by key.

    ``outputs`` are those at the largest strength of an edit: the next stage is fed with them.
    """

    stage: Stage
    outputs: dict[str, np.ndarray]

    @property
    def output(self) -> np.ndarray:
        """The stage's first output."""
        return next(iter(self.outputs.values()))


class Case(NamedTuple):
    """What a stage is run for: the number of a prompt, and of an edit's strength."""

    judge: int
    strength: int


_Outputs = dict[Case, dict[str, np.ndarray]]
"""What a stage gave in each case, by key."""


@dataclass(frozen=True)
class _Judge:
    """A prompt that judges a stage: PyTorch's tensors, and those that the ONNX stages gave."""

    references: References
    tensors: Mapping[str, np.ndarray]

    def expected(self, key: str, case: Case) -> np.ndarray:
        """PyTorch's output of a stage, by its key."""
        return self.references.tensors[strength_key(key, case.strength)]


@dataclass(frozen=True)
class StageWriter:
    """Writes stages into a bundle's folder and checks each.

    Attributes:
        root: the bundle's folder.
        precision: of weights and arithmetic inside the graphs.
        specs: inputs and outputs of each stage, by name.
        references: what the stages are judged by.
        strengths: how many strengths of an edit the UNet serves; a stage that takes the index of
            one is run at each.
        variants: of a stage that is checked at several inputs: the tensors of each, by key. The
            references of the second are 'output_1', and so on, as at strengths.
        islands: by stage, the FP32 islands of a bundle whose graphs are to come out the same again.
            None: find out which are needed.
        others: of further prompts, which judge the stages too.

    """

    root: Path
    precision: Precision
    specs: Mapping[str, StageSpec]
    references: References
    strengths: int = 0
    islands: Mapping[str, tuple[str, ...]] | None = None
    variants: Sequence[Mapping[str, np.ndarray]] = ()
    others: tuple[References, ...] = ()

    def write(self, source: StageSource, tensors: Mapping[str, np.ndarray]) -> WrittenStage:
        """Export the module of ``source``, run the graph, and compare with the first reference.

        Args:
            source: what to write.
            tensors: what the stage is fed with, by key: inputs of the reference, and what the ONNX
                stages before this one gave. So errors accumulate along the chain, as they do in
                the finished bundle.

        Raises:
            HipaError: the graph does not give what PyTorch gives, or cannot be exported or run.

        """
        stage, outputs = self.write_judged(source, [tensors])
        return WrittenStage(stage, outputs[0])

    def write_judged(
        self, source: StageSource, chains: Sequence[Mapping[str, np.ndarray]]
    ) -> tuple[Stage, list[dict[str, np.ndarray]]]:
        """Export the module of ``source``, and compare with the reference of every prompt.

        Args:
            source: what to write.
            chains: what the stage is fed with, as ``write``'s ``tensors``: for the first reference,
                and for as many of the others as are to judge this stage.

        Returns:
            The stage, with the worst parity of all; and its outputs for each chain, by key, at the
            largest strength of an edit.

        Raises:
            HipaError: as ``write``.

        """
        every = (self.references, *self.others)
        judges = [_Judge(*pair) for pair in zip(every, chains, strict=False)]
        islands = self._export(source)
        outputs = self._run(source, judges)
        problems = self._problems(source, judges, outputs)

        # In range, and still not faithful: find the layers whose rounding hurts, at the first
        # case that fails, and export once more with these in float32. Another case may need more.
        mended: set[Case] = set()
        if self.precision == "fp16" and self.islands is None:
            while problems and min(problems) not in mended:
                failing = min(problems)
                mended.add(failing)
                islands = self._export(source, judges, failing, islands)
                outputs = self._run(source, judges)
                problems = self._problems(source, judges, outputs)

        # Another adaptor must fit the bundle's own graph, so its islands cannot grow.
        elif problems and self.islands is not None:
            raise HipaError(
                f"{source.name} {problems[min(problems)]}, with the bundle's FP32 islands. "
                "Export a bundle of its own."
            )

        path = f"{source.name}/model.onnx"
        spec = self.specs[source.name]
        stage = Stage(
            spec=spec,
            path=path,
            precision="fp32" if islands and source.name in TEXT_PARTS else self.precision,
            opset=OPSET,
            fp32_islands=islands,
            parity=self._worst_parity(source, judges, outputs),
            cost=stage_cost(self.root / path, spec),
        )
        return stage, [outputs[Case(number, 0)] for number in range(len(judges))]

    @torch.no_grad()
    def _export(
        self,
        source: StageSource,
        judges: Sequence[_Judge] = (),
        failing: Case | None = None,
        known: tuple[str, ...] = (),
    ) -> tuple[str, ...]:
        """Build the module, convert it and write the graph; returns the names of its islands.

        With ``failing``, the islands are those that are ``known``, and the layers without which the
        module is not faithful in that case.
        """
        module = source.build()
        islands: tuple[str, ...] = ()
        if self.precision == "fp16":
            if self.islands is not None:
                islands = self.islands[source.name]
            else:
                islands = self._find_islands(source, module, judges, failing, known)
            to_half(module, islands)
            free_memory()  # of the float32 weights
        export_stage(module, self.specs[source.name], self.root / source.name)

        del module
        free_memory()
        return islands

    def _find_islands(
        self,
        source: StageSource,
        module: nn.Module,
        judges: Sequence[_Judge],
        failing: Case | None,
        known: tuple[str, ...],
    ) -> tuple[str, ...]:
        """Names of the parts of ``module`` that must stay in float32."""
        # Its attention is transformers' own, whose scores nobody watches, and the whole text
        # encoder costs next to nothing.
        if source.name in TEXT_PARTS and failing is not None:
            return _whole(module)
        found = islands_by_range(module, self._reached(module))
        islands = whole_attentions([*found, *known])
        if failing is not None:
            judge = judges[failing.judge]
            tensors = self._feeds(source, judge.tensors)[failing.strength]
            feed = []
            for key in source.inputs:
                # The module is still in float32; a bundle's context may be float16 already.
                dtype = judge.references.tensors[key].dtype
                feed.append(torch.from_numpy(tensors[key].astype(dtype)))
            expected = judge.expected(source.output, failing)
            islands = fewest_islands(module, tuple(feed), partial(_is_faithful, expected), islands)

        if islands and source.name in TEXT_PARTS:
            return _whole(module)
        return islands

    def _reached(self, module: nn.Module) -> dict[str, float]:
        """The largest magnitudes at ``module``'s parts for any prompt, by their names in it.

        The references recorded them in the general form, by place in the diffusers folder. A
        ``StepBias`` has the place of the projection that it replaces, whose outputs it holds.
        """
        reached: dict[str, float] = {}
        for name, _ in module.named_modules():
            place = place_of(module, name)
            for references in (self.references, *self.others):
                if place in references.largest:
                    value = references.largest[place]
                    reached[name] = max(reached.get(name, 0.0), value)
        return reached

    def _run(self, source: StageSource, judges: Sequence[_Judge]) -> _Outputs:
        """What the stage gives in each case."""
        outputs: _Outputs = {}
        for number, judge in enumerate(judges):
            for index, feed in enumerate(self._feeds(source, judge.tensors)):
                outputs[Case(number, index)] = self._run_once(source, feed)
        return outputs

    def _feeds(
        self, source: StageSource, tensors: Mapping[str, np.ndarray]
    ) -> list[Mapping[str, np.ndarray]]:
        """What the stage is run with: once, at each strength that it takes, or each variant."""
        if self.variants:
            return [{**tensors, **variant} for variant in self.variants]
        if "step" not in source.inputs:
            return [tensors]
        return [{**tensors, "step": np.asarray([index])} for index in range(self.strengths)]

    def _run_once(
        self, source: StageSource, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        spec = self.specs[source.name]
        feed: dict[str, np.ndarray] = {}
        for tensor, key in zip(spec.inputs, source.inputs, strict=True):
            feed[tensor.name] = tensors[key].astype(tensor.dtype)
        made = run_all_apart(self.root / source.name / "model.onnx", spec, feed)
        outputs = zip(source.outputs, spec.outputs, strict=True)
        return {key: made[tensor.name] for key, tensor in outputs}

    def _problems(
        self,
        source: StageSource,
        judges: Sequence[_Judge],
        outputs: _Outputs,
    ) -> dict[Case, str]:
        """What is wrong with the outputs, by case; empty if all is well."""
        problems: dict[Case, str] = {}
        for case, made in outputs.items():
            for key, output in made.items():
                wrong = problem(output, judges[case.judge].expected(key, case), self.precision)
                if wrong:
                    problems[case] = wrong
        return problems

    def _worst_parity(
        self,
        source: StageSource,
        judges: Sequence[_Judge],
        outputs: _Outputs,
    ) -> Parity:
        """The parity of the case that is furthest from PyTorch.

        Raises:
            HipaError: one of them does not pass the gate.

        """
        measured = []
        for case, made in outputs.items():
            judge = judges[case.judge]
            name = source.name
            if len(judges) > 1:
                name += f" of {brief(judge.references.prompt)}"
            for key, output in made.items():
                expected = judge.expected(key, case)
                measured.append(check_parity(name, output, expected, self.precision))
        return min(measured, key=lambda parity: parity.psnr_db)


def check_parity(
    stage: str, output: np.ndarray, expected: np.ndarray, precision: Precision
) -> Parity:
    """How near ``output`` is to ``expected``: the gate that every exported stage passes.

    Raises:
        HipaError: it is not near enough, so the export must not go on.

    """
    wrong = problem(output, expected, precision)
    if wrong:
        raise HipaError(f"{stage} in {precision} {wrong}. Export with --dtype fp32.")
    return compare(output, expected)


def _whole(module: nn.Module) -> tuple[str, ...]:
    """All of a text stage, as islands: the encoder, or SDXL's two and the conditioning."""
    return tuple(name for name, _ in module.named_children())


def _is_faithful(expected: np.ndarray, output: Tensor) -> bool:
    return problem(output.numpy(), expected, "fp16") is None
