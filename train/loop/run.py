"""The training loop, and the run folder that makes it resumable.

Shape suffixes: B rows of a batch, N rows of a sample grid, H W image height and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, nn

from hipa_deploy.disk.files import describe_write_error
from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError, as_line, brief, first_line
from hipa_deploy.images.png import grid
from hipa_deploy.interrupts import interruptible
from hipa_deploy.train.distribution.terms import DistributionTerms
from hipa_deploy.train.loop.checkpoint import (
    check_tensors,
    damaged,
    optimizer_state,
    read_checkpoint,
)
from hipa_deploy.train.loop.optimizer import learning_rate
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.progress_bar import ProgressBar
from hipa_deploy.train.loop.scalars import Scalars
from hipa_deploy.train.losses.hipa_loss import HipaLoss, Terms
from hipa_deploy.train.model.mixed_precision import grad_scaler
from hipa_deploy.train.model.weight_average import WeightAverage
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

# Mean loss of rows (int64 [B]) at a step, and its unweighted terms.
LossAt = Callable[[Tensor, int], tuple[Tensor, Terms]]
# Columns of a sample grid, uint8 [N, H, W, 3] each.
SampleColumns = Callable[[], list[Tensor]]

# Settings that a resumed run may change: they do not decide which steps it takes. Prompts are
# compared by their hash instead, wherever their file lies.
CHANGEABLE_SETTINGS = {
    "checkpoint_every",
    "sample_every",
    "samples",
    "gradient_checkpointing",
    "micro_batch",
    "prompts",
    "prompts_column",
    "written",
    "latent_discriminator.real_images",
}
# The parts of a run's identity beside its recipe, and what a message calls another value of each.
OTHER_IDENTITY = {
    "base_unet_sha256": "another base model",
    "base_vae_sha256": "another VAE",
    "adaptor_sha256": "another adaptor",
    "initial_sha256": "another adaptor to start from",
    "prompts_sha256": "other prompts",
    "loras": "other LoRAs, or at other scales",
    "embeddings": "other embeddings",
}


def run_steps(
    run: Run,
    count: int,
    loss_at: LossAt,
    sample_columns: SampleColumns,
    console: Console,
    distribution: DistributionTerms | None = None,
) -> None:
    """Take the steps that ``run`` still lacks, with a progress bar, scalars, samples, checkpoints.

    Args:
        run: The run, resumed by its caller; its recipe says how many steps and how large a batch.
        count: How many examples there are; a step's batch is drawn from these rows.
        loss_at: ``loss_at(rows, step)`` returns the mean loss over ``rows``, int64 [B], a scalar
            with a gradient, and its terms. It must depend on the weights, rows and step alone, or
            a resumed run would differ from an unbroken one.
        sample_columns: Returns the columns of a sample grid, uint8 [N, H, W, 3] each.
        console: Where progress goes.
        distribution: Its fake score, if it has one, follows the student after each step.

    Raises:
        HipaError: the loss is not finite; the last checkpoint is kept.
        StoppedError: Ctrl-C or SIGTERM reached any process; a checkpoint of the last step is kept.

    """
    recipe = run.recipe
    processes = run.processes
    with (
        run.open_scalars() as scalars,
        interruptible(under_launcher=processes.count > 1) as stop,
        ProgressBar(console) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=run.step)
        while run.step < recipe.steps:
            # The step itself.
            rows = batch_rows(count, recipe.batch, recipe.seed, run.step)
            values = run.accumulate(rows, loss_at)
            record = run.take_step(values["loss"])
            if distribution is not None:
                values |= run.follow(rows, distribution)

            # Report it.
            progress.update(task, completed=run.step)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            progress.note = f"step {run.step}  {shown}"
            scalars.add({**values, **record}, run.step)

            # The checkpoint comes before the samples: a failure while sampling then loses no step.
            # All processes must stop after the same step, so one that was interrupted tells the
            # rest.
            done = run.step == recipe.steps
            stopping = processes.any(stop.is_set())
            if run.step % recipe.checkpoint_every == 0 or done or stopping:
                run.save()
                console.print(progress.note, highlight=False)
            if run.step % recipe.sample_every == 0 or done:
                run.save_samples(sample_columns)
            if stopping and not done:
                message = f"stopped at step {run.step} of {recipe.steps}."
                raise processes.stopped(f"{message} Run the same command to resume.", stop.number)


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Rows of one step, int64 [batch], drawn from ``count``: without repetition where possible.

    They depend on (seed, step) alone, so that a resumed run draws what an unbroken one would.

    Example:
        >>> batch_rows(count=100, batch=8, seed=0, step=5).shape
        torch.Size([8])

    """
    rows = np.random.default_rng((seed, step)).choice(count, size=batch, replace=batch > count)
    return torch.from_numpy(rows)


@dataclass
class Run:
    """A training run and its folder, whose ``state.pt`` holds everything the next step depends on.

    The main process writes the folder and all processes read it: on several machines it must be on
    a disk that they share.

    Args:
        folder: The run folder, made at the first checkpoint.
        weights: The weights to train, by name.
        optimizer: Its parameter groups hold ``weights`` first, then those that the loss trains.
        identity: What the run depends on: ``recipe``, and keys of OTHER_IDENTITY. It is stored as
            JSON, and a checkpoint of another identity is refused.
        recipe: The run's settings.
        processes: The processes that share each batch.
        extra_state: Further parameters that a checkpoint stores: those of the loss.
        step: Optimiser steps taken so far.

    """

    folder: Path
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    recipe: Recipe | DecoderRecipe
    processes: Processes = field(default_factory=Processes)
    extra_state: dict[str, nn.Parameter] = field(default_factory=dict)
    step: int = 0
    saved_step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        device = next(iter(self.weights.values())).device
        self.scaler = grad_scaler(self.recipe.mixed_precision, device)
        self.average = WeightAverage(self.weights, self.recipe.ema_decay)

    @property
    def path(self) -> Path:
        """The checkpoint file."""
        return self.folder / "state.pt"

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
        self._check_same_run(state["identity"])
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
        self.scaler.unscale_(self.optimizer)
        norms = []
        for group in self.optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], settings.clip_norm)
            norms.append(norm.item())
            group["lr"] = group.get("own_rate", rate)
        self.check_finite(loss, sum(norms))

        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)

        record = {"gradient_norm": norms[0], "learning_rate": rate}
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
        return record

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

    def save_samples(self, sample_columns: SampleColumns) -> None:
        """Write a sample grid of the averaged weights: samples/step-00001000.png."""
        with self.processes.fail_together():
            if self.processes.is_main:
                path = self.folder / "samples" / f"step-{self.step:08d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.average.applied():
                    columns = sample_columns()
                image = grid([column.numpy() for column in columns])
                Image.fromarray(image).save(path)

    def open_scalars(self) -> Scalars:
        """TensorBoard scalars in the run folder; a process that does not write records nothing."""
        folder = self.folder / "tensorboard" if self.processes.is_main else None
        return Scalars(folder, self.step)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        remedy = "Remove it, or choose another output folder."
        for key, other in OTHER_IDENTITY.items():
            # What a run of an older version does not know is none.
            if (stored.get(key) or None) != (self.identity.get(key) or None):
                raise HipaError(f"run folder {self.folder} was started with {other}. {remedy}")

        # The recipes are compared setting by setting, so that the message can name the first
        # change.
        with as_line(f"checkpoint {self.path} is damaged", f"Remove {self.folder}."):
            before = self._flat_recipe(stored["recipe"])
        now = self._flat_recipe(self.identity["recipe"])
        for key in sorted(before.keys() | now.keys()):
            if key in CHANGEABLE_SETTINGS or before.get(key) == now.get(key):
                continue
            change = f"{shown(key)} was {_text(before.get(key))}, is {_text(now.get(key))}"
            raise HipaError(f"run folder {self.folder} has another recipe: {change}. {remedy}")

    def _flat_recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A stored recipe as 'table.key' -> JSON value, with defaults for settings that it lacks.

        A setting that was introduced after the recipe was stored has its default, so that older
        runs resume. A recipe with settings that exist no more does not validate, and stays as it
        is.
        """
        with suppress(ValidationError):
            recipe = type(self.recipe).model_validate(recipe).model_dump(mode="json")
        # Through JSON and back: a tuple and the list that was stored for it are then equal.
        return _flat(json.loads(json.dumps(recipe)))


def _text(value: Any) -> str:
    """A setting's value for a message, as it stands in a recipe."""
    return shown(value) if isinstance(value, str) else brief(value)


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
    loss: HipaLoss,
    recipe: Recipe | DecoderRecipe,
    processes: Processes,
    distribution: DistributionTerms | None = None,
) -> dict[str, nn.Parameter]:
    """The parameters of the loss, and of ``distribution``, that a checkpoint stores.

    Raises:
        HipaError: the loss is balanced by gradients, which must be those of one whole batch, and
            batches are divided among processes or into micro-batches.

    """
    if loss.balance is not None and (processes.count > 1 or recipe.micro_batch):
        raise processes.error(
            "loss.balance = 'gradient' needs whole batches: one process, and no micro_batch."
        )
    if distribution is None:
        return loss.state
    return {**loss.state, **distribution.state}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with keys such as 'loss.hf_weight'."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
