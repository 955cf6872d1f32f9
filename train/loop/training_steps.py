"""The loop of a training: steps, checkpoints, measurements and samples.

Shape suffixes: B rows of a batch, N rows of a sample grid, H W image height and width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from hipa_deploy.interrupts import interruptible
from hipa_deploy.train.distribution.terms import DistributionTerms
from hipa_deploy.train.loop.identity import flat
from hipa_deploy.train.loop.output import BEST, FINISHED
from hipa_deploy.train.loop.progress_bar import ProgressBar
from hipa_deploy.train.loop.run import LossAt, Run
from hipa_deploy.train.loop.scalars import Trackers

# The sample grid of a step, uint8 [height, width, 3].
SampleGrid = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Watch:
    """What a run is watched by, beside its loss: samples, and a held-out measure.

    Args:
        sample_grid: Makes the sample grid of a step, uint8 [height, width, 3].
        log_with: 'tensorboard', and names of accelerate's trackers.
        measure: Returns held-out values by name; the first of them decides which step is best.
            None measures nothing.
        every: Steps between measurements.
        save_best: Writes the adaptor or decoder of the best step into a new folder.

    """

    sample_grid: SampleGrid
    log_with: Sequence[str] = ("tensorboard",)
    measure: Callable[[], dict[str, float]] | None = None
    every: int = 1
    save_best: Callable[[Path], object] | None = None


def run_steps(
    run: Run,
    count: int,
    loss_at: LossAt,
    watch: Watch,
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
        watch: Samples, trackers and the held-out measure.
        console: Where progress goes.
        distribution: Its fake score, if it has one, follows the student after each step.

    Raises:
        HipaError: the loss is not finite; the last checkpoint is kept.
        StoppedError: Ctrl-C or SIGTERM reached any process; a checkpoint of the last step is kept.

    """
    recipe = run.recipe
    processes = run.processes
    for line in run.notes:
        console.print(line, highlight=False)
    with (
        open_trackers(run, watch, console) as trackers,
        interruptible(under_launcher=processes.count > 1) as stop,
        ProgressBar(console) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=run.step)
        if run.step == 0:
            measure(run, watch, trackers, console)
        # It ended early and was stopped before its result was written.
        if processes.any(run.plateau.ends):
            console.print(early_end(run), highlight=False)
            return
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
            trackers.add({**values, **record}, run.step)

            # Measure it. All processes must stop after the same step, so one that was interrupted,
            # or that sees a plateau, tells the rest.
            done = run.step == recipe.steps
            if run.step % watch.every == 0 or done:
                measure(run, watch, trackers, console)
            ends_early = processes.any(run.plateau.ends) and not done
            stopping = processes.any(stop.is_set())

            # The checkpoint comes before the samples: a failure while sampling then loses no step.
            if run.step % recipe.checkpoint_every == 0 or done or stopping or ends_early:
                run.save()
                console.print(progress.note, highlight=False)
            if run.step % recipe.sample_every == 0 or done or ends_early:
                save_samples(run, watch, trackers)
            if ends_early:
                console.print(early_end(run), highlight=False)
                break
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


def measure(run: Run, watch: Watch, trackers: Trackers, console: Console) -> None:
    """Take the held-out measure in the main process, and keep the weights if they are best."""
    if watch.measure is None:
        return
    with run.processes.fail_together():
        if run.processes.is_main:
            with run.written_weights():
                values = watch.measure()
                _judge(run, values, watch)
            trackers.add(values, run.step)
            text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            console.print(f"step {run.step}  {text}", highlight=False)


def _judge(run: Run, values: dict[str, float], watch: Watch) -> None:
    is_best = run.plateau.take(next(iter(values.values())), run.step)
    # The start is no result of a training: there is nothing to keep.
    if not is_best or run.step == 0 or watch.save_best is None:
        return
    best = run.folder / f"{BEST}{run.step:08d}"
    if best.exists():
        shutil.rmtree(best)
    watch.save_best(best)
    for other in run.folder.glob(f"{BEST}*"):
        if other != best:
            shutil.rmtree(other)


def early_end(run: Run) -> str:
    """Why the run ends here."""
    return (
        f"stopped early at step {run.step}: the held-out measure has not been better than "
        f"{run.plateau.best:.4f}, of step {run.plateau.step}, for {run.plateau.without} "
        "measurements"
    )


def save_samples(run: Run, watch: Watch, trackers: Trackers) -> None:
    """Write a sample grid of the weights that would be written: samples/step-00001000.png."""
    with run.processes.fail_together():
        if run.processes.is_main:
            path = run.folder / "samples" / f"step-{run.step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with run.written_weights():
                image = watch.sample_grid(run.step)
            try:
                Image.fromarray(image).save(path)
            except OSError as error:  # Pillow's does not name the file
                path.unlink(missing_ok=True)
                raise OSError(error.errno, error.strerror, str(path)) from None
            trackers.add_image("samples", image, run.step)


def open_trackers(run: Run, watch: Watch, console: Console) -> Trackers:
    """The trackers of the run; a process that does not write records nothing."""
    folder = run.folder if run.processes.is_main else None
    config = {key: _plain(value) for key, value in flat(run.identity["recipe"]).items()}
    with run.processes.fail_together():
        return Trackers(folder, run.step, watch.log_with, config, console)


def result_lines(out: Path, run: Run, finished_steps: int) -> list[str]:
    """What to tell at the end: the time it took, what was kept, and how to go on."""
    spent = run.spent.until(run.step)
    hours = sum(entry.hours for entry in spent)
    cards = ", ".join(dict.fromkeys(entry.card for entry in spent))
    lines = [f"{run.step} steps, {hours:.2f} hours on {cards}"]
    if finished_steps:
        kept = run.folder / FINISHED
        lines.append(f"the result of {finished_steps} steps is kept in {kept}")
    best = run.folder / f"{BEST}{run.plateau.step:08d}"
    if best.is_dir() and run.plateau.step != run.step:
        lines.append(
            f"the held-out measure was best at step {run.plateau.step}: its result is {best}"
        )
    lines.append(f"to go on from here: the same command with more --steps than {run.step}")
    return lines


def _plain(value: Any) -> Any:
    """A setting as a tracker takes it."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)
