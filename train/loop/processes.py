"""The processes that train together: those that ``accelerate launch`` started, or this one alone.

Every process holds the whole model and takes its share of each batch. The gradients of the adaptor
are summed over the processes; an adaptor is small, and so is the message. accelerate's PartialState
says which process is which. Its Accelerator is not used, for two reasons: it fixes one precision
for all of a Python process, and on a CPU it computes in float32 without a word where fp16 was
configured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from rich.console import Console
from torch import Tensor

from hipa_deploy.errors import HipaError, StoppedError
from hipa_deploy.train.losses.gradient_balance import WHOLE_BATCHES, divides_batch
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

# What `accelerate launch` can set up beside plain data parallelism, by its environment variable.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


# How long a process waits for the others. NCCL's own limit is ten minutes, after which it aborts
# them all. SDXL's teacher pairs take 7.5 hours of four A100s each (predicted), and GPUs of one kind
# differ by some percent. The main process alone measures how faithful a decoder is.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them.

    Args:
        index: The number of this process, from 0.
        count: How many there are.
        device: This process's device; None leaves the choice to ``DiffusionModel.load``.

    Example:
        >>> processes = Processes.join(recipe)
        >>> processes.share(torch.arange(8))  # of two processes, the first
        tensor([0, 1, 2, 3])

    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def join(cls, recipe: Recipe | DecoderRecipe, device: str | None = None) -> Processes:
        """Connect to the other processes, if a launcher started any.

        Raises:
            HipaError: the launcher is configured for a precision other than the recipe's or for
                something that this project does not support, the batch has fewer rows than there
                are processes, or the loss is balanced by the gradients of one whole batch and the
                batch is divided.

        """
        _check_launcher(recipe)
        cpu = device == "cpu" or not torch.cuda.is_available() or _is_set("ACCELERATE_USE_CPU")
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        if recipe.batch < state.num_processes:
            raise HipaError(
                f"batch = {recipe.batch} is less than the {state.num_processes} processes. "
                "Expected at least one row for each: raise batch, or start fewer processes."
            )

        # accelerate gives every process of a launch a GPU of its own. A process that is alone takes
        # the device of the call, or leaves the choice to the model.
        own_device = None
        if device:
            own_device = torch.device(device)
        elif state.num_processes > 1:
            own_device = state.device
        processes = cls(state.process_index, state.num_processes, own_device)
        if divides_batch(recipe.loss.balance, recipe.micro_batch, processes.count):
            raise processes.error(WHOLE_BATCHES)
        return processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def console(self, console: Console | None = None) -> Console:
        """``console`` (default: stderr) in the main process, a silent one in the others."""
        if not self.is_main:
            return Console(quiet=True)
        return console or Console(stderr=True)

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch; the shares of all processes, in order, are the batch."""
        return rows.tensor_split(self.count)[self.index]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float32 tensor by its sum over the processes, bit-equal in all of them."""
        if self.count == 1:
            return
        # One message for all tensors: many small ones would each cost the latency of the network.
        sizes = [tensor.numel() for tensor in tensors]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        total = reduce(flat, reduction="sum")
        for tensor, part in zip(tensors, total.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process."""
        return any(self._flags_of_all(flag))

    def check_same(self, value: Any, what: str) -> None:
        """Raise HipaError in every process unless ``value`` is equal in all of them.

        Args:
            value: Anything that pickles.
            what: What it decides, for the message: 'what to train'.

        """
        values = gather_object([value]) if self.count > 1 else [value]
        if any(other != values[0] for other in values):
            raise self.error(
                f"the {self.count} processes do not agree on {what}. They must see the same "
                "folders, models and recipe (see docs/how-to/several-gpus.md)."
            )

    def error(self, message: str) -> HipaError:
        """An error that every process raises; only the main one's has a text, to print it once."""
        return HipaError(message if self.is_main else "")

    def stopped(self, message: str, number: int) -> StoppedError:
        """As ``error``, for a stop that the signal ``number`` asked for."""
        return StoppedError(message if self.is_main else "", number)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """If the block fails in one process, fail in all of them at its end.

        Otherwise the others would wait for a process that is gone.

        Raises:
            HipaError: the block raised HipaError or OSError in some process. It has its text in the
                processes where that happened, or in the main one alone if it is among them.

        """
        failure: Exception | None = None
        try:
            yield
        except (HipaError, OSError) as error:
            failure = error

        failed = self._flags_of_all(failure is not None)
        main_failed = failed[0]
        if failure is not None and (self.is_main or not main_failed):
            raise failure
        if any(failed):
            raise HipaError("")

    def _flags_of_all(self, flag: bool) -> list[bool]:
        """The ``flag`` of every process, in order."""
        # A sum of one-hot vectors: the same collective as the gradients', on every backend.
        flags = torch.zeros(self.count, device=self.device)
        flags[self.index] = flag
        self.all_reduce_sum([flags])
        return flags.bool().tolist()


def is_main() -> bool:
    """Whether this is the main process, once ``Processes.join`` has connected to the others."""
    return PartialState().is_main_process


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Leave torch's process group at the end of the block, which is a whole command.

    Gloo's threads otherwise run on while the interpreter ends, and now and then abort the process
    (https://github.com/pytorch/pytorch/issues/190489).

    NCCL's threads do not. With NCCL the group is left only if the block succeeds: after an error in
    one process, leaving would wait for the others, which still wait for its gradients
    (https://github.com/pytorch/torchtitan/pull/1342).
    """
    try:
        yield
    except BaseException:
        if _in_process_group() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
        raise
    if _in_process_group():
        torch.distributed.destroy_process_group()


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_launcher(recipe: Recipe | DecoderRecipe) -> None:
    for variable, name in UNSUPPORTED.items():
        if _is_set(variable):
            raise HipaError(
                f"accelerate is configured for {name}. "
                "Expected plain processes: accelerate launch --multi_gpu"
            )

    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if configured not in ("no", recipe.mixed_precision):
        raise HipaError(
            f"accelerate is configured for {configured}, the recipe says "
            f"mixed_precision = {recipe.mixed_precision!r}. "
            f"Expected the recipe's: accelerate launch --mixed_precision {recipe.mixed_precision}"
        )


def _is_set(variable: str) -> bool:
    """Whether an environment variable of accelerate is true, in any of its spellings."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
