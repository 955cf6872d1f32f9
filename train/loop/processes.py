"""The processes that train together: those that ``accelerate launch`` started, or this one alone.

Every process holds the whole model and takes its share of each batch; the adaptor's gradients are added up, which is
little to send. accelerate's PartialState says who is who. Its Accelerator is left out on purpose: it fixes one
precision for all of a Python process, and on a CPU computes in float32 where fp16 was asked for, without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from rich.console import Console
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

# What `accelerate launch` can ask for beside data parallelism, by the variable that says so.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@dataclass(frozen=True)
class Processes:
    """``count`` processes, of which this is the one numbered ``index``, on ``device`` (None: the model's choice)."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def join(cls, recipe: Recipe | DecoderRecipe, device: str | None = None) -> Processes:
        """Meet the other processes, if a launcher started any.

        Raises:
            HipaError: the launcher asks for what the recipe or this project does not do, or a batch is too small.

        """
        _check_launcher(recipe)
        cpu = device == "cpu" or not torch.cuda.is_available() or _flag("ACCELERATE_USE_CPU")
        state = PartialState(cpu=cpu)
        if recipe.batch < state.num_processes:
            got = f"batch = {recipe.batch} is less than the {state.num_processes} processes"
            raise HipaError(
                f"{got}. Expected a row for each at least: raise batch, or start fewer."
            )
        own = torch.device(device) if device else state.device if state.num_processes > 1 else None
        return cls(state.process_index, state.num_processes, own)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    def console(self, console: Console | None = None) -> Console:
        """``console`` (stderr by default) in the main process, a mute one in the others."""
        return (console or Console(stderr=True)) if self.is_main else Console(quiet=True)

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch; those of all processes, in order, are the batch."""
        return rows.tensor_split(self.count)[self.index]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float32 tensor by its sum over the processes: one message, and bit-equal everywhere."""
        if self.count == 1:
            return
        total = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), reduction="sum")
        for tensor, part in zip(
            tensors, total.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process."""
        return any(self._votes(flag))

    def check_same(self, value: Any, what: str) -> None:
        """Raise HipaError in every process unless ``value`` is equal in all of them."""
        values = gather_object([value]) if self.count > 1 else [value]
        if any(other != values[0] for other in values):
            remedy = "They must see the same folders, models and recipe"
            raise self.error(
                f"the {self.count} processes do not agree on {what}. {remedy} (see docs/how-to/several-gpus.md)."
            )

    def error(self, message: str) -> HipaError:
        """What every process raises at once: with its text in the main process only, so that one line is printed."""
        return HipaError(message if self.is_main else "")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block together: what one process cannot do fails in all, and none waits for one that is gone.

        Raises:
            HipaError: with its text in one process it happened in at least, the main one before others.

        """
        failure: Exception | None = None
        try:
            yield
        except (HipaError, OSError) as error:
            failure = error
        failed = self._votes(failure is not None)
        if failure is not None and (self.is_main or not failed[0]):
            raise failure
        if any(failed):
            raise HipaError("")

    def _votes(self, flag: bool) -> list[bool]:
        votes = torch.zeros(self.count, device=self.device)
        votes[self.index] = flag
        self.add_up([votes])
        return votes.bool().tolist()


def is_main() -> bool:
    """Whether this is the process that speaks, once ``Processes.join`` has met the others."""
    return PartialState().is_main_process


@contextmanager
def parting() -> Iterator[None]:
    """Part from the other processes at the end of a command.

    Gloo's threads otherwise run on while the interpreter ends, and now and then abort the process
    (https://github.com/pytorch/pytorch/issues/190489). NCCL's do not, and after an error in one process it would wait
    there for the others, which are still adding up (https://github.com/pytorch/torchtitan/pull/1342).
    """
    try:
        yield
    except BaseException:
        if _joined() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
        raise
    if _joined():
        torch.distributed.destroy_process_group()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_launcher(recipe: Recipe | DecoderRecipe) -> None:
    for variable, name in UNSUPPORTED.items():
        if _flag(variable):
            raise HipaError(
                f"accelerate is configured for {name}. Expected plain processes: accelerate launch --multi_gpu"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", recipe.mixed_precision):
        got = f"accelerate is configured for {asked}, the recipe says mixed_precision = {recipe.mixed_precision!r}"
        raise HipaError(f"{got}. Expected one precision: set it in the recipe.")


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
