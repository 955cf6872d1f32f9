"""One export under way: what the stages share, and how one of them is written and judged."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hipa_deploy.bundle.manifest import (
    AdaptorInfo,
    Axis,
    DecoderInfo,
    EncoderInfo,
    OneStep,
    Parity,
    Stage,
    StageSpec,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.export import gate as parity
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.graph_cost import stage_cost
from hipa_deploy.export.graph.half_precision import Ranges, fewest_islands, to_half
from hipa_deploy.export.graph.to_onnx import OPSET, export_stage
from hipa_deploy.export.model_parts import BaseModel
from hipa_deploy.export.run_apart import run_apart
from hipa_deploy.export.task import TaskPlan

REFERENCE_PROMPT = "3d emoji of a red apple"
WHOLE_TEXT_ENCODER = ("encoder",)


@dataclass
class ExportJob:
    """What the stages share. ``reference`` holds PyTorch's float32 tensors, ``given`` those of the ONNX stages.

    ``islands``, by stage, are those of a bundle whose graph is wanted once more; None: find out which are needed.
    """

    options: ExportOptions
    base: BaseModel
    root: Path
    step: OneStep
    axes: dict[str, Axis]
    plan: TaskPlan
    specs: dict[str, StageSpec] = field(default_factory=dict)
    reference: dict[str, np.ndarray] = field(default_factory=dict)
    given: dict[str, np.ndarray] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    prompt: str = REFERENCE_PROMPT
    adaptor: AdaptorInfo | None = None
    decoder: DecoderInfo | None = None
    encoder: EncoderInfo | None = None
    islands: Mapping[str, tuple[str, ...]] | None = None

    @property
    def batch(self) -> int:
        """Images of the reference."""
        return self.options.size("batch") or 1

    @property
    def moments(self) -> list[tuple[int, float]]:
        """Timestep and alpha_bar of the step, at each strength of an edit."""
        return [
            (moment.timestep, moment.alpha_bar) for moment in self.plan.strengths or (self.step,)
        ]

    def write(
        self, name: str, build: Callable[[], nn.Module], inputs: tuple[str, ...], output: str
    ) -> None:
        """Export the module that ``build`` returns, run it, and compare with the reference that ``build`` left.

        The module lives only while it is exported, so the model is never in memory twice; if float16 turns out
        not to be faithful it is built once more, to find the layers that need float32.
        """
        precision, folder = self.options.dtype, self.root / name
        islands = self._to_onnx(name, build)
        got = self._run_all(name, inputs)
        if precision == "fp16" and self.islands is None and (wrong := self._problems(got, output)):
            self.given["step"] = np.asarray([min(wrong)])
            islands = self._to_onnx(name, build, mend=(inputs, at_moment(output, min(wrong))))
            got = self._run_all(name, inputs)
        if self.islands is not None and (wrong := self._problems(got, output)):
            raise HipaError(
                f"{name} {wrong[min(wrong)]}, with the bundle's FP32 islands. Export a bundle of its own."
            )
        self.given[output] = got[0]
        self.stages.append(
            Stage(
                spec=self.specs[name],
                path=f"{name}/model.onnx",
                precision="fp32" if islands == WHOLE_TEXT_ENCODER else precision,
                opset=OPSET,
                fp32_islands=islands,
                parity=self._parity(name, got, output),
                cost=stage_cost(folder / "model.onnx", self.specs[name]),
            )
        )

    def _parity(self, name: str, got: list[np.ndarray], output: str) -> Parity:
        """Of several strengths, the worst."""
        found = [
            parity.check(name, value, self.reference[at_moment(output, index)], self.options.dtype)
            for index, value in enumerate(got)
        ]
        return min(found, key=lambda measured: measured.psnr_db)

    def _problems(self, got: list[np.ndarray], output: str) -> dict[int, str]:
        """What is wrong, by the number of the strength."""
        found = {
            index: parity.problem(
                value, self.reference[at_moment(output, index)], self.options.dtype
            )
            for index, value in enumerate(got)
        }
        return {index: wrong for index, wrong in found.items() if wrong}

    @torch.no_grad()
    def _to_onnx(
        self,
        name: str,
        build: Callable[[], nn.Module],
        mend: tuple[tuple[str, ...], str] | None = None,
    ) -> tuple[str, ...]:
        """Build, convert to the asked precision, write the graph; the names of the parts left in float32."""
        with Ranges().watching() as ranges:
            module = build()
        islands: tuple[str, ...] = ()
        if self.options.dtype == "fp16":
            islands = (
                self._find_islands(name, module, ranges, mend)
                if self.islands is None
                else self.islands[name]
            )
            to_half(module, islands)
        export_stage(module, self.specs[name], self.root / name)
        del module
        gc.collect()  # torch.export leaves cycles that hold the weights
        return islands

    def _find_islands(
        self, name: str, module: nn.Module, ranges: Ranges, mend: tuple[tuple[str, ...], str] | None
    ) -> tuple[str, ...]:
        islands = ranges.islands(module)
        if mend:
            feed = tuple(
                torch.from_numpy(self.given[key].astype(self.reference[key].dtype))
                for key in mend[0]
            )
            islands = fewest_islands(module, feed, partial(self._faithful, mend[1]), islands)
        if (
            islands and name == "text_encoder"
        ):  # its attention is transformers', and the whole costs next to nothing
            return WHOLE_TEXT_ENCODER
        return islands

    def _faithful(self, output: str, got: Tensor) -> bool:
        return parity.problem(got.numpy(), self.reference[output], "fp16") is None

    def _run_all(self, name: str, inputs: tuple[str, ...]) -> list[np.ndarray]:
        """What the stage gives; of a UNet for several strengths, at each."""
        if "step" not in inputs:
            return [self._run(name, inputs, self.given)]
        numbers = range(len(self.plan.strengths))
        return [
            self._run(name, inputs, self.given | {"step": np.asarray([number])})
            for number in numbers
        ]

    def _run(
        self, name: str, inputs: tuple[str, ...], given: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        spec = self.specs[name]
        feed = {
            t.name: given[key].astype(t.dtype) for t, key in zip(spec.inputs, inputs, strict=True)
        }
        return run_apart(self.root / name / "model.onnx", spec, feed)


def at_moment(name: str, number: int) -> str:
    """The key of a reference tensor at an edit's strength ``number``: 'latents' at the largest, then 'latents_1'."""
    return f"{name}_{number}" if number else name
