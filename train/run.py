"""The run folder that makes a training resumable, and the steps between its checkpoints."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.images import grid
from hipa_deploy.train.loss import Terms
from hipa_deploy.train.progress import ProgressBar
from hipa_deploy.train.recipe import DecoderRecipe, OptimiserSettings, Recipe

# What may change between two sittings of one run.
FREE_TO_CHANGE = {"checkpoint_every", "sample_every", "samples", "gradient_checkpointing", "prompts", "prompts_column"}
# What a run's identity may hold beside the recipe, and how to say that it differs.
BELONGS_TO = {
    "base_unet_sha256": "another base model",
    "base_vae_sha256": "another VAE",
    "adaptor_sha256": "another adaptor",
    "prompts_sha256": "other prompts",
}


def run_steps(
    run: Run,
    recipe: Recipe | DecoderRecipe,
    loss_at: Callable[[int], tuple[Tensor, Terms]],
    samples: Callable[[], list[Tensor]],
    console: Console,
) -> None:
    """Take the steps that ``run`` still lacks, with a progress bar, scalars, sample grids and checkpoints.

    ``loss_at(step)`` is the loss and its terms, from the step's number and the weights alone; ``samples()`` the
    columns of a sample grid, uint8 [N, H, W, 3] each.

    Raises:
        HipaError: the loss is not finite, or Ctrl-C; the last checkpoint stays.

    """
    with run.writer() as scalars, interruptible() as stop, ProgressBar(console) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=run.step)
        while run.step < recipe.steps:
            total, terms = loss_at(run.step)
            record = run.take_step(total, recipe.optimiser, recipe.steps)

            # Report, sample, checkpoint.
            values = {"loss": total.item(), **{name: term.item() for name, term in terms.items()}}
            progress.update(task, completed=run.step)
            progress.note = f"step {run.step}  " + "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            for name, value in {**values, **record}.items():
                scalars.add_scalar(name, value, run.step)
            done = run.step == recipe.steps
            if run.step % recipe.sample_every == 0 or done:
                run.save_samples(samples())
            if run.step % recipe.checkpoint_every == 0 or done or stop.is_set():
                run.save()
                console.print(progress.note, highlight=False)
            if stop.is_set() and not done:
                raise HipaError(f"stopped at step {run.step} of {recipe.steps}. Run the same command to resume.")


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

    ``identity`` says which run it is: ``recipe``, and any keys of BELONGS_TO. It is compared as JSON.
    """

    folder: Path
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    step: int = 0
    saved_step: int = field(default=0, init=False)

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / "state.pt"

    def resume(self) -> None:
        """Load the checkpoint if there is one.

        Raises:
            HipaError: it is damaged, or belongs to another recipe or model.

        """
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            stored = json.loads(state["identity"])
        except Exception as error:  # torch raises whatever unpickling met
            got = type(error).__name__
            raise HipaError(f"checkpoint {self.path} is damaged ({got}). Remove {self.folder}.") from None
        self._check_same_run(stored)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.saved_step = state["step"]

    def save(self) -> None:
        """Write beside, then rename: a run killed while saving keeps its last checkpoint."""
        state = {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "identity": json.dumps(self.identity),
        }
        scratch = self.path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, scratch)
            scratch.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise HipaError(
                f"checkpoint {self.path} cannot be written: {first_line(error)}. The one before it stays."
            ) from None
        self.saved_step = self.step

    def take_step(self, total: Tensor, settings: OptimiserSettings, steps: int) -> dict[str, float]:
        """One optimiser step down the loss ``total``, the one of ``steps`` that is next: what it took, for the record.

        Raises:
            HipaError: the loss or its gradient is not finite.

        """
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.weights.values(), settings.clip_norm)
        self.check_finite(total.item(), norm.item())
        rate = learning_rate(settings, self.step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"gradient_norm": norm.item(), "learning_rate": rate}

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise HipaError if the loss or its gradient norm is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = f"The checkpoint of step {self.saved_step} is kept." if self.saved_step else "No checkpoint exists yet."
        got = f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1}"
        raise HipaError(f"training diverged: {got}. {kept} Lower optimiser.learning_rate.")

    def save_samples(self, columns: list[Tensor]) -> None:
        """Columns of uint8 [N, H, W, 3] side by side as samples/step-00001000.png."""
        path = self.folder / "samples" / f"step-{self.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid([column.numpy() for column in columns])).save(path)

    def writer(self) -> SummaryWriter:
        """TensorBoard scalars; what a killed run wrote past its checkpoint is hidden."""
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        remedy = "Remove it, or choose another output folder."
        for key, other in BELONGS_TO.items():
            if stored.get(key) != self.identity.get(key):
                raise HipaError(f"run folder {self.folder} was started with {other}. {remedy}")
        was, now = _flat(stored["recipe"]), _flat(json.loads(json.dumps(self.identity["recipe"])))
        for key in sorted(was.keys() | now.keys()):
            if key not in FREE_TO_CHANGE and was.get(key) != now.get(key):
                change = f"{key} was {was.get(key)}, is {now.get(key)}"
                raise HipaError(f"run folder {self.folder} has another recipe: {change}. {remedy}")


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step is never cut in half; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
