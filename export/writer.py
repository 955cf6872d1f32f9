"""A module and its references -> an ONNX stage that is checked against them."""

from __future__ import annotations

import gc
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
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.graph_cost import stage_cost
from hipa_deploy.export.graph.half_precision import fewest_islands, islands_by_range, to_half
from hipa_deploy.export.graph.modules import place_of
from hipa_deploy.export.graph.run_apart import run_apart
from hipa_deploy.export.graph.to_onnx import OPSET, export_stage
from hipa_deploy.export.references import References, strength_key

WHOLE_TEXT_ENCODER = ("encoder",)


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

    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    output: str


class WrittenStage(NamedTuple):
    """A stage of the manifest, and what it gave for the reference.

    ``output`` is the tensor at the largest strength of an edit: the next stage is fed with it.
    """

    stage: Stage
    output: np.ndarray


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

    """

    root: Path
    precision: Precision
    specs: Mapping[str, StageSpec]
    references: References
    strengths: int = 0
    islands: Mapping[str, tuple[str, ...]] | None = None
    variants: Sequence[Mapping[str, np.ndarray]] = ()

    def write(self, source: StageSource, tensors: Mapping[str, np.ndarray]) -> WrittenStage:
        """Export the module of ``source``, run the graph, and compare with the references.

        Args:
            source: what to write.
            tensors: what the stage is fed with, by key: inputs of the reference, and what the ONNX
                stages before this one gave. So errors accumulate along the chain, as they do in
                the finished bundle.

        Raises:
            HipaError: the graph does not give what PyTorch gives, or cannot be exported or run.

        """
        islands = self._export(source)
        outputs = self._run(source, tensors)
        problems = self._problems(source, outputs)

        # In range, and still not faithful: find the layers whose rounding hurts, at the first
        # strength that fails, and export once more with these in float32.
        if problems and self.precision == "fp16" and self.islands is None:
            failing = min(problems)
            islands = self._export(source, tensors, failing)
            outputs = self._run(source, tensors)

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
            precision="fp32" if islands == WHOLE_TEXT_ENCODER else self.precision,
            opset=OPSET,
            fp32_islands=islands,
            parity=self._worst_parity(source, outputs),
            cost=stage_cost(self.root / path, spec),
        )
        return WrittenStage(stage, outputs[0])

    @torch.no_grad()
    def _export(
        self,
        source: StageSource,
        tensors: Mapping[str, np.ndarray] | None = None,
        failing: int = 0,
    ) -> tuple[str, ...]:
        """Build the module, convert it and write the graph; returns the names of its islands.

        With ``tensors``, the islands include the layers without which the module is not faithful
        at the strength ``failing``.
        """
        module = source.build()
        islands: tuple[str, ...] = ()
        if self.precision == "fp16":
            if self.islands is not None:
                islands = self.islands[source.name]
            else:
                islands = self._find_islands(source, module, tensors, failing)
            to_half(module, islands)
        export_stage(module, self.specs[source.name], self.root / source.name)

        # torch.export leaves cycles that hold the weights; without this they stay in memory.
        del module
        gc.collect()
        return islands

    def _find_islands(
        self,
        source: StageSource,
        module: nn.Module,
        tensors: Mapping[str, np.ndarray] | None,
        failing: int,
    ) -> tuple[str, ...]:
        """Names of the parts of ``module`` that must stay in float32."""
        islands = islands_by_range(module, self._reached(module))
        if tensors is not None:
            tensors = self._feeds(source, tensors)[failing]
            feed = []
            for key in source.inputs:
                # The module is still in float32; a bundle's context may be float16 already.
                dtype = self.references.tensors[key].dtype
                feed.append(torch.from_numpy(tensors[key].astype(dtype)))
            expected = self.references.tensors[strength_key(source.output, failing)]
            islands = fewest_islands(module, tuple(feed), partial(_is_faithful, expected), islands)

        # Its attention is transformers' own, whose scores nobody watches, and the whole text
        # encoder costs next to nothing.
        if islands and source.name == "text_encoder":
            return WHOLE_TEXT_ENCODER
        return islands

    def _reached(self, module: nn.Module) -> dict[str, float]:
        """The largest magnitudes at ``module``'s parts, by their names in it.

        The references recorded them in the general form, by place in the diffusers folder. A
        ``StepBias`` has the place of the projection that it replaces, whose outputs it holds.
        """
        reached: dict[str, float] = {}
        for name, _ in module.named_modules():
            place = place_of(module, name)
            if place in self.references.largest:
                reached[name] = self.references.largest[place]
        return reached

    def _run(self, source: StageSource, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """What the stage gives for each of its feeds."""
        return [self._run_once(source, feed) for feed in self._feeds(source, tensors)]

    def _feeds(
        self, source: StageSource, tensors: Mapping[str, np.ndarray]
    ) -> list[Mapping[str, np.ndarray]]:
        """What the stage is run with: once, at each strength that it takes, or each variant."""
        if self.variants:
            return [{**tensors, **variant} for variant in self.variants]
        if "step" not in source.inputs:
            return [tensors]
        return [{**tensors, "step": np.asarray([index])} for index in range(self.strengths)]

    def _run_once(self, source: StageSource, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        spec = self.specs[source.name]
        feed: dict[str, np.ndarray] = {}
        for tensor, key in zip(spec.inputs, source.inputs, strict=True):
            feed[tensor.name] = tensors[key].astype(tensor.dtype)
        return run_apart(self.root / source.name / "model.onnx", spec, feed)

    def _problems(self, source: StageSource, outputs: list[np.ndarray]) -> dict[int, str]:
        """What is wrong with the outputs, by the index of the strength; empty if all is well."""
        problems: dict[int, str] = {}
        for index, output in enumerate(outputs):
            expected = self.references.tensors[strength_key(source.output, index)]
            wrong = problem(output, expected, self.precision)
            if wrong:
                problems[index] = wrong
        return problems

    def _worst_parity(self, source: StageSource, outputs: list[np.ndarray]) -> Parity:
        """The parity of the strength that is furthest from PyTorch.

        Raises:
            HipaError: one of them does not pass the gate.

        """
        measured = []
        for index, output in enumerate(outputs):
            expected = self.references.tensors[strength_key(source.output, index)]
            measured.append(check_parity(source.name, output, expected, self.precision))
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


def _is_faithful(expected: np.ndarray, output: Tensor) -> bool:
    return problem(output.numpy(), expected, "fp16") is None
