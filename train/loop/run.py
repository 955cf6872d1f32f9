"""The run folder that makes a training resumable, and the steps between its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.images.png import grid
from hipa_deploy.train.loop.interrupt import interruptible
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.progress_bar import ProgressBar
from hipa_deploy.train.losses.hipa_loss import HipaLoss, Terms
from hipa_deploy.train.model.mixed_precision import grad_scaler
from hipa_deploy.train.model.weight_average import Average
from hipa_deploy.train.recipes.recipe import DecoderRecipe, OptimiserSettings, Recipe

# What may change between two sittings of one run.
FREE_TO_CHANGE = {
    "checkpoint_every", "sample_every", "samples", "gradient_checkpointing", "micro_batch", "prompts", "prompts_column",
}  # fmt: skip
# What a run's identity may hold beside the recipe, and how to say that it differs.
BELONGS_TO = {
    "base_unet_sha256": "another base model",
    "base_vae_sha256": "another VAE",
    "adaptor_sha256": "another adaptor",
    "initial_sha256": "another adaptor to start from",
    "prompts_sha256": "other prompts",
}


def run_steps(
    run: Run,
    count: int,
    loss_at: Callable[[Tensor, int], tuple[Tensor, Terms]],
    samples: Callable[[], list[Tensor]],
    console: Console,
) -> None:
    """Take the steps that ``run`` still lacks, with a progress bar, scalars, sample grids and checkpoints.

    A step's batch is drawn from ``count`` rows. ``loss_at(rows, step)`` is the mean loss of these rows, int64 [B],
    and its terms, from the weights alone; ``samples()`` the columns of a sample grid, uint8 [N, H, W, 3] each.

    Raises:
        HipaError: the loss is not finite, or Ctrl-C or SIGTERM in any process; the last checkpoint stays.

    """
    recipe, processes = run.recipe, run.processes
    with (
        run.writer() as scalars,
        interruptible(processes.count > 1) as stop,
        ProgressBar(console) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=run.step)
        while run.step < recipe.steps:
            rows = batch_rows(count, recipe.batch, recipe.seed, run.step)
            values = run.accumulate(rows, loss_at)
            record = run.take_step(values["loss"])

            # Report, checkpoint, sample: the checkpoint first, as nothing depends on the rest.
            progress.update(task, completed=run.step)
            progress.note = f"step {run.step}  " + "  ".join(
                f"{name} {value:.3f}" for name, value in values.items()
            )
            scalars.add({**values, **record}, run.step)
            done, stopping = run.step == recipe.steps, processes.any(stop.is_set())
            if run.step % recipe.checkpoint_every == 0 or done or stopping:
                run.save()
                console.print(progress.note, highlight=False)
            if run.step % recipe.sample_every == 0 or done:
                run.save_samples(samples)
            if stopping and not done:
                resume = "Run the same command to resume."
                raise processes.error(f"stopped at step {run.step} of {recipe.steps}. {resume}")


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Rows of one step, int64 [batch], from (seed, step) alone: a resumed run draws what an unbroken one would."""
    rows = np.random.default_rng((seed, step)).choice(count, size=batch, replace=batch > count)
    return torch.from_numpy(rows)


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Linear warm-up, then constant or a cosine down to a hundredth of the peak."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.decay == "cosine":
        progress = max(0.0, step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
    return rate


@dataclass
class Run:
    """The run folder: ``state.pt`` holds everything that the next step depends on.

    ``kept`` is what the loss remembers from step to step. ``identity`` says which run it is: ``recipe``, and keys of
    BELONGS_TO. It is compared as JSON. The main process writes; the others read the same folder, so on several machines
    it must be on a disk that they share.
    """

    folder: Path
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    recipe: Recipe | DecoderRecipe
    processes: Processes = field(default_factory=Processes)
    kept: dict[str, nn.Parameter] = field(default_factory=dict)
    step: int = 0
    saved_step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        device = next(iter(self.weights.values())).device
        self.scaler = grad_scaler(self.recipe.mixed_precision, device)
        self.average = Average(self.weights, self.recipe.ema_decay)

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / "state.pt"

    def resume(self) -> None:
        """Load the checkpoint if there is one.

        Raises:
            HipaError: it is damaged, or belongs to another recipe or model, or the processes see different ones.

        """
        with self.processes.together():
            if self.path.exists():
                self._load()
        self.processes.check_same(
            (self.step, json.dumps(self.identity, sort_keys=True)), "what to train"
        )

    def _load(self) -> None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            stored = json.loads(state["identity"])
        except Exception as error:  # torch raises whatever unpickling met
            got = type(error).__name__
            raise HipaError(
                f"checkpoint {self.path} is damaged ({got}). Remove {self.folder}."
            ) from None
        self._check_same_run(stored)
        with torch.no_grad():
            for name, weight in {**self.weights, **self.kept}.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = state["step"]

    def save(self) -> None:
        """Write beside, then rename: a run killed while saving, or a full disk, keeps its last checkpoint."""
        with self.processes.together():
            if self.processes.is_main:
                self._write()
        self.saved_step = self.step

    def _write(self) -> None:
        state = {
            "weights": {
                name: weight.detach() for name, weight in {**self.weights, **self.kept}.items()
            },
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.mean,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "identity": json.dumps(self.identity),
        }
        scratch = self.path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, scratch)
            scratch.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            scratch.unlink(missing_ok=True)
            raise HipaError(
                f"checkpoint {self.path} cannot be written: {first_line(error)}. {self._kept()}"
            ) from None

    def accumulate(
        self, rows: Tensor, loss_at: Callable[[Tensor, int], tuple[Tensor, Terms]]
    ) -> dict[str, float]:
        """Gradients of the mean loss over ``rows``: the loss and its terms.

        Each process takes its share, in pieces of ``micro_batch``. A piece counts by its rows, so that how a batch is
        divided changes the rounding and nothing else.
        """
        share, sums = self.processes.share(rows), dict[str, Tensor]()
        for part in share.split(self.recipe.micro_batch or len(share)):
            total, terms = loss_at(part, self.step)
            weight = len(part) / len(rows)
            self.scaler.scale(total * weight).backward()
            for name, value in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0) + value.detach() * weight
        values = torch.stack([*sums.values()])
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.processes.add_up(
            [*(weight.grad for weight in trained if weight.grad is not None), values]
        )
        return dict(zip(sums, values.tolist(), strict=True))

    def take_step(self, loss: float) -> dict[str, float]:
        """One optimiser step down the gradients that ``accumulate`` left: what it took, for the record.

        Raises:
            HipaError: the loss or its gradient is not finite.

        """
        settings = self.recipe.optimiser
        self.scaler.unscale_(self.optimizer)
        rate, groups = (
            learning_rate(settings, self.step, self.recipe.steps),
            self.optimizer.param_groups,
        )
        norm, *others = (
            nn.utils.clip_grad_norm_(group["params"], settings.clip_norm).item() for group in groups
        )
        self.check_finite(loss, sum(others, norm))
        for group in groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        return {"gradient_norm": norm, "learning_rate": rate, **scale}

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise HipaError if the loss or its gradient norm is not finite.

        A gradient beyond fp16 is no divergence: the scaler skips that step and halves its scale, while it can.
        """
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or skipped):
            return
        got = f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1}"
        raise self.processes.error(
            f"training diverged: {got}. {self._kept()} Lower optimiser.learning_rate."
        )

    def _kept(self) -> str:
        return (
            f"The checkpoint of step {self.saved_step} is kept."
            if self.saved_step
            else "No checkpoint exists yet."
        )

    def save_samples(self, samples: Callable[[], list[Tensor]]) -> None:
        """Columns of uint8 [N, H, W, 3] side by side as samples/step-00001000.png, of the averaged weights if any."""
        with self.processes.together():
            if self.processes.is_main:
                path = self.folder / "samples" / f"step-{self.step:08d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.average.applied():
                    columns = samples()
                Image.fromarray(grid([column.numpy() for column in columns])).save(path)

    def writer(self) -> Scalars:
        """TensorBoard scalars; what a killed run wrote past its checkpoint is hidden."""
        return Scalars(self.folder / "tensorboard" if self.processes.is_main else None, self.step)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        remedy = "Remove it, or choose another output folder."
        for key, other in BELONGS_TO.items():
            if stored.get(key) != self.identity.get(key):
                raise HipaError(f"run folder {self.folder} was started with {other}. {remedy}")
        was, now = (
            self._with_defaults(stored["recipe"]),
            self._with_defaults(self.identity["recipe"]),
        )
        for key in sorted(was.keys() | now.keys()):
            if key not in FREE_TO_CHANGE and was.get(key) != now.get(key):
                change = f"{key} was {was.get(key)}, is {now.get(key)}"
                raise HipaError(f"run folder {self.folder} has another recipe: {change}. {remedy}")

    def _with_defaults(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Flat, as JSON has it; a setting that came later than a stored recipe has its default."""
        with suppress(ValidationError):  # of settings that are no more: compared as they stand
            recipe = type(self.recipe).model_validate(recipe).model_dump(mode="json")
        return _flat(json.loads(json.dumps(recipe)))


def new_optimizer(
    weights: dict[str, nn.Parameter], loss: HipaLoss, settings: OptimiserSettings
) -> torch.optim.Optimizer:
    """AdamW of the weights, and of the loss's own in a group without momentum (as in Sauer et al. 2021) or decay."""
    groups: list[dict[str, Any]] = [{"params": [*weights.values()]}]
    if loss.trained:
        groups.append(
            {"params": [*loss.trained.values()], "betas": (0.0, 0.99), "weight_decay": 0.0}
        )
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def loss_state(
    loss: HipaLoss, recipe: Recipe | DecoderRecipe, processes: Processes
) -> dict[str, nn.Parameter]:
    """What a checkpoint keeps of the loss.

    Raises:
        HipaError: a loss that is balanced by gradients, which are those of one whole batch, where batches are divided.

    """
    if loss.balance is not None and (processes.count > 1 or recipe.micro_batch):
        raise processes.error(
            "loss.balance = 'gradient' needs whole batches: one process, and no micro_batch."
        )
    return loss.state


class Scalars:
    """A TensorBoard writer, or none at all in a process that does not write."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step + 1) if folder else None

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.writer:
            with (
                suppress(OSError) if kind else nullcontext()
            ):  # a full disk has been reported then, and better
                self.writer.close()

    def add(self, values: dict[str, float], step: int) -> None:
        """Record the values of a step."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
