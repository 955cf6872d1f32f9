"""The training loop, and the run folder that makes it resumable.

Shape suffixes: B rows of a batch, N rows of a sample grid, H W image height and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipa_deploy.disk.files import describe_write_error
from hipa_deploy.errors import HipaError, as_line, first_line
from hipa_deploy.train.distribution.terms import DistributionTerms
from hipa_deploy.train.loop.checkpoint import (
    check_tensors,
    damaged,
    optimizer_state,
    read_checkpoint,
)
from hipa_deploy.train.loop.identity import check_not_replaced, check_same_run
from hipa_deploy.train.loop.optimizer import learning_rate
from hipa_deploy.train.loop.output import CHECKPOINT
from hipa_deploy.train.loop.plateau import Plateau
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.spent import Spent
from hipa_deploy.train.losses.hipa_loss import HipaLoss, Terms
from hipa_deploy.train.model.mixed_precision import grad_scaler
from hipa_deploy.train.model.weight_average import WeightAverage
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

# Mean loss of rows (int64 [B]) at a step, and its unweighted terms.
LossAt = Callable[[Tensor, int], tuple[Tensor, Terms]]


@dataclass
class Run:
    """A training run and its folder, whose ``state.pt`` holds everything the next step depends on.

    The main process writes the folder and all processes read it: on several machines it must be on
    a disk that they share.

    Args:
        folder: The run folder, made at the first checkpoint.
        weights: The weights to train, by name.
        optimizer: Its parameter groups hold ``weights`` first, then those that the loss trains.
        identity: What the run depends on: ``recipe``, and keys of OTHER_IDENTITY,
            FURTHER_IDENTITY and REPLACED. It is stored as JSON, and a checkpoint of another
            identity is refused.
        recipe: The run's settings.
        processes: The processes that share each batch.
        extra_state: Further parameters that a checkpoint stores: those of the loss.
        step: Optimiser steps taken so far.
        plateau: Of the held-out measure, if the recipe has one.

    Attributes:
        notes: What to tell about a run that goes on, a line each.

    """

    folder: Path
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    recipe: Recipe | DecoderRecipe
    processes: Processes = field(default_factory=Processes)
    extra_state: dict[str, nn.Parameter] = field(default_factory=dict)
    step: int = 0
    plateau: Plateau = field(default_factory=lambda: Plateau(patience=0, min_delta=0.0))
    saved_step: int = field(default=0, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        device = next(iter(self.weights.values())).device
        self.scaler = grad_scaler(self.recipe.mixed_precision, device)
        self.average = WeightAverage(self.weights, self.recipe.ema_decay)
        self.spent = Spent(device, self.processes.count)

    @property
    def path(self) -> Path:
        """The checkpoint file."""
        return self.folder / CHECKPOINT

    def resume(self) -> None:
        """Load the checkpoint if there is one.

        Raises:
            HipaError: it is damaged or belongs to another recipe or model, or the processes of a
                launch do not see the same one.

        """
        with self.processes.fail_together():
            if self.path.exists():
                self._load()
        identity = json.dumps(self.identity, sort_keys=True)
        self.processes.check_same((self.step, identity), "what to train")

    def _load(self) -> None:
        weights = self._stored_weights()
        state = read_checkpoint(self.path, weights, self.recipe.steps)
        check_same_run(self.folder, state["identity"], self.identity, type(self.recipe))
        check_not_replaced(self.folder, state["identity"], self.identity)
        check_tensors(self.path, "weights", state["weights"], weights)
        check_tensors(self.path, "average", state["average"], self.average.mean)
        optimizer = optimizer_state(self.path, state["optimizer"], self.optimizer)

        # Copied in place: the optimiser, the model and the average hold these very tensors.
        with as_line(f"checkpoint {self.path} is damaged", f"Remove {self.folder}."):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(state["weights"][name])
            self.optimizer.load_state_dict(optimizer)
            self.average.load(state["average"])
            self._load_scaler(state["scaler"])
        self.step = state["step"]
        self.saved_step = self.step
        self.spent.load(state.get("training"), self.step, self.path)
        self.plateau.load(state.get("held_out"), self.path)
        before = state["identity"]["recipe"]
        settings = self.recipe.held_out.model_dump(include={"patience", "min_delta"})
        if settings.items() - before.get("held_out", {}).items():
            self.plateau.start_again()
        self._note_other_steps(before["steps"])

    def _note_other_steps(self, before: int) -> None:
        """Say what it means that the run goes on to another step than it was started for."""
        steps = self.recipe.steps
        if steps == before:
            return
        self.plateau.start_again()
        self.notes.append(
            f"the run of {before} steps goes on from step {self.step} to step {steps}"
        )
        settings = self.recipe.optimiser
        if settings.decay == "constant":
            return
        was = learning_rate(settings, max(0, self.step - 1), before)
        now = learning_rate(settings, self.step, steps)
        self.notes.append(
            f"warning: the {settings.decay} decay now ends at step {steps}: the learning rate goes "
            f"from {was:.2g} to {now:.2g} here. The adaptor will differ from one that was trained "
            f"for {steps} steps at once. With optimiser.decay = 'constant' it would be the same."
        )

    def _load_scaler(self, stored: dict[str, Any]) -> None:
        """Restore the scale of fp16 gradients; its rules are this run's own."""
        own = self.scaler.state_dict()
        if not own:
            return
        scale = stored.get("scale")
        tracked = stored.get("_growth_tracker")
        if not isinstance(scale, float) or not 0 < scale < 1e30 or type(tracked) is not int:
            raise damaged(self.path, "its loss scale cannot be used")
        self.scaler.load_state_dict({**own, "scale": scale, "_growth_tracker": tracked})

    def _stored_weights(self) -> dict[str, nn.Parameter]:
        return {**self.weights, **self.extra_state}

    def save(self) -> None:
        """Write the checkpoint.

        It is written beside the last one and then renamed, so that a run that is killed while
        saving, or meets a full disk, keeps its last checkpoint.

        Raises:
            HipaError: it cannot be written.

        """
        with self.processes.fail_together():
            if self.processes.is_main:
                self._write()
        self.saved_step = self.step

    def _write(self) -> None:
        weights = {name: weight.detach() for name, weight in self._stored_weights().items()}
        state = {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.mean,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "identity": json.dumps(self.identity),
            "training": [entry.model_dump() for entry in self.spent.until(self.step)],
            "held_out": self.plateau.state(),
        }
        scratch = self.path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A file of Python's own: of a path torch reports a full disk as "unexpected pos".
            with scratch.open("wb") as file:
                torch.save(state, file)
            scratch.replace(self.path)
        except (OSError, RuntimeError) as error:
            scratch.unlink(missing_ok=True)
            reason = first_line(error)
            if isinstance(error, OSError):
                reason = str(describe_write_error(error, self.path, _state_bytes(state)).strerror)
            raise HipaError(
                f"checkpoint {self.path} cannot be written: {reason}. {self._last_checkpoint()}"
            ) from None

    def accumulate(
        self, rows: Tensor, loss_at: LossAt, step: int | None = None
    ) -> dict[str, float]:
        """Add up the gradients of the mean loss over ``rows``, int64 [batch], at a step.

        Each process takes its share of the rows, in pieces of ``micro_batch``. How a batch is
        divided changes its rounding and nothing else.

        Returns:
            The loss and its unweighted terms, by name, over the whole batch.

        """
        if step is None:
            step = self.step
        share = self.processes.share(rows)
        sums: dict[str, Tensor] = {}
        for part in share.split(self.recipe.micro_batch or len(share)):
            total, terms = loss_at(part, step)

            # A piece counts by its rows: a mean of unequal pieces' means would favour the last one.
            weight = len(part) / len(rows)
            # A score that is the only term gives none while it waits (score.delay).
            if total.requires_grad:
                self.scaler.scale(total * weight).backward()
            for name, value in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0) + value.detach() * weight

        # One message for gradients and values, and .tolist() waits for the device once.
        values = torch.stack(list(sums.values()))
        gradients = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradients.append(parameter.grad)
        self.processes.all_reduce_sum([*gradients, values])
        return dict(zip(sums, values.tolist(), strict=True))

    def take_step(self, loss: float) -> dict[str, float]:
        """Take one optimiser step with the gradients that ``accumulate`` left.

        Args:
            loss: The loss of this step, to check that it is finite.

        Returns:
            For the record: gradient norm, learning rate, and in fp16 the loss scale.

        Raises:
            HipaError: the loss or its gradient is not finite.

        """
        settings = self.recipe.optimiser
        rate = learning_rate(settings, self.step, self.recipe.steps)

        # Unscale before clipping: the limit is on the true gradient. Each group is clipped by
        # itself, so that a steep discriminator does not slow the student.
        moves = self._has_gradient()
        if moves:
            self.scaler.unscale_(self.optimizer)
        norms = []
        for group in self.optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], settings.clip_norm)
            norms.append(norm.item())
            group["lr"] = group.get("own_rate", rate)
        self.check_finite(loss, sum(norms))

        if moves:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)

        record = {"gradient_norm": norms[0], "learning_rate": rate}
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
        return record

    def _has_gradient(self) -> bool:
        """Whether ``accumulate`` left any gradient. Without one the loss scaler cannot step."""
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        return any(parameter.grad is not None for parameter in parameters)

    def follow(self, rows: Tensor, distribution: DistributionTerms) -> dict[str, float]:
        """Take the fake score's steps after one of the student, with that step's rows.

        Returns:
            The fake score's loss by name, of the last of its steps; empty if it takes none.

        Raises:
            HipaError: the loss or its gradient is not finite.

        """
        values: dict[str, float] = {}
        steps = distribution.following_steps
        if not steps:
            return values
        with distribution.following():
            for number in range(steps):
                loss_at = partial(distribution.fake_loss, number=number)
                values = self.accumulate(rows, loss_at, self.step - 1)
                self._take_following_step(values.pop("loss"))
        return values

    def _take_following_step(self, loss: float) -> None:
        # Only the fake score's weights have a gradient here, so AdamW moves no others.
        self.scaler.unscale_(self.optimizer)
        norm = 0.0
        for group in self.optimizer.param_groups:
            clipped = nn.utils.clip_grad_norm_(group["params"], self.recipe.optimiser.clip_norm)
            norm += clipped.item()
        self.check_finite(loss, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise HipaError if the loss or its gradient norm is not finite.

        A gradient beyond the range of fp16 is no divergence: the scaler skips that step and halves
        its scale. Once the scale is down to 1, halving it helps no more.
        """
        scaler_skips = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or scaler_skips):
            return
        got = f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1}"
        raise self.processes.error(
            f"training diverged: {got}. {self._last_checkpoint()} Lower optimiser.learning_rate."
        )

    def _last_checkpoint(self) -> str:
        """A sentence for messages."""
        if self.saved_step:
            return f"The checkpoint of step {self.saved_step} is kept."
        return "No checkpoint exists yet."

    @contextmanager
    def written_weights(self) -> Iterator[None]:
        """The weights that are written in the end: the average, if the recipe asks for it."""
        average = self.average.applied() if self.recipe.written == "average" else nullcontext()
        with average:
            yield


def check_extends(out: Path, run: Run, result: dict[str, Any]) -> None:
    """Check that the finished result in ``out`` is of the run that is resumed.

    Args:
        out: The result's folder.
        run: The run, resumed.
        result: The result's metadata.

    Raises:
        HipaError: it is another run's, or of more steps than the checkpoint.

    """
    check_same_run(out, result, run.identity, type(run.recipe))
    taken = result["steps_trained"]
    if taken > run.step:
        raise run.processes.error(
            f"{out} took {taken} steps, and the checkpoint {run.path} is of step {run.step}: it "
            "is not the one that the result was made with. Choose another output folder."
        )


def _state_bytes(state: Any) -> int:
    """The size of all tensors in a checkpoint."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_state_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(_state_bytes(value) for value in state)
    return 0


def loss_state(
    loss: HipaLoss, distribution: DistributionTerms | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the loss, and of ``distribution``, that a checkpoint stores."""
    if distribution is None:
        return loss.state
    return {**loss.state, **distribution.state}
