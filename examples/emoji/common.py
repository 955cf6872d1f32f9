"""What the pre-training stages share: the data set, exact resume, and an average of the weights."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(frozen=True)
class EmojiSet:
    """Images, uint8 [N, H, W, 3], and the line of captions.csv of each."""

    images_BHWC: np.ndarray
    rows: list[dict[str, str]]

    @classmethod
    def load(cls, folder: Path) -> EmojiSet:
        """Read what build_dataset.py wrote into ``folder``."""
        with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return cls(np.load(folder / "emoji.npz")["images"], rows)

    def only(self, *splits: str) -> EmojiSet:
        """The images of these splits: 'train', 'pair', 'concept'."""
        keep = [i for i, row in enumerate(self.rows) if row["split"] in splits]
        return EmojiSet(self.images_BHWC[keep], [self.rows[i] for i in keep])

    @property
    def captions(self) -> list[str]:
        """The caption of each image."""
        return [row["caption"] for row in self.rows]

    def pixels_BCHW(self) -> torch.Tensor:
        """float32 [N, 3, H, W] in [-1, 1]."""
        return to_pixels(self.images_BHWC)


def to_pixels(images_BHWC: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@dataclass
class Run:
    """A training that can be stopped and resumed.

    Everything that the next step depends on is in ``state.pt``. Batches are drawn from a generator
    seeded with (seed, step), so a resumed run sees the same batches as one that was never stopped.
    """

    folder: Path
    modules: dict[str, torch.nn.Module]
    optimizer: torch.optim.Optimizer
    steps: int
    seed: int = 0
    ema_decay: float = 0.0
    step: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    ema: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shown: dict[str, list[float]] = field(default_factory=dict)
    seconds_shown: float = 0.0

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / "state.pt"

    def resume(self) -> None:
        """Continue from the checkpoint; without one, begin the average at the initial weights."""
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            self.seconds = state["seconds"]
            self.seconds_shown = self.seconds
            self.ema = state["ema"]
        elif self.ema_decay:
            for name, module in self.modules.items():
                weights = module.state_dict()
                self.ema[name] = {key: value.clone() for key, value in weights.items()}

    def save(self) -> None:
        """Write the checkpoint.

        It is written to another file and renamed: a run killed while saving keeps its last one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "ema": self.ema,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the current weights; integers (counters) are copied."""
        # Early on the average forgets faster: the initial weights say little.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    self.ema[name][key].lerp_(value, 1 - decay)
                else:
                    self.ema[name][key].copy_(value)

    def batches(
        self, size: int, count: int, save_every: int = 200, save_seconds: float = 240.0
    ) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
        """Yield (indices, generator) until ``steps``; after each step average, count and save.

        Args:
            size: rows a batch.
            count: rows to draw from, with replacement.
            save_every: steps between checkpoints.
            save_seconds: a checkpoint is also written when the last one is older than this.

        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.size = size
        saved = time.perf_counter()
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            self.task = progress.add_task(self.folder.name, total=self.steps, completed=self.step)
            self.progress = progress
            while self.step < self.steps:
                started = time.perf_counter()
                generator = torch.Generator().manual_seed((self.seed << 32) + self.step)
                yield torch.randint(count, (size,), generator=generator), generator
                self.step += 1
                self.seconds += time.perf_counter() - started
                if self.ema_decay:
                    self.update_ema()
                progress.update(self.task, completed=self.step)
                old = time.perf_counter() - saved > save_seconds
                if old or self.step % save_every == 0 or self.step == self.steps:
                    self.save()
                    saved = time.perf_counter()

    def show(self, **terms: Any) -> None:
        """Show numbers beside the progress bar, and print their means every 100 steps."""
        words = " ".join(f"{name} {float(value):.4f}" for name, value in terms.items())
        self.progress.update(self.task, description=f"{self.folder.name} {words}")
        for name, value in terms.items():
            self.shown.setdefault(name, []).append(float(value))
        if self.step % 100 == 0:
            self._print_means()

    def _print_means(self) -> None:
        """One line: the means since the last line, and the images a second."""
        words = []
        for name, values in self.shown.items():
            words.append(f"{name} {sum(values) / len(values):.4f}")
        count = len(next(iter(self.shown.values())))
        speed = count * self.size / max(self.seconds - self.seconds_shown, 1e-9)
        text = f"step {self.step} {' '.join(words)} ({self.seconds:.0f} s"
        # The first line of a process has one step, which says nothing of the speed.
        text += f", {speed:.1f} images/s)" if count > 1 else ")"
        self.progress.console.print(text, soft_wrap=True)
        self.shown.clear()
        self.seconds_shown = self.seconds


class Float32GroupNorm(torch.nn.GroupNorm):
    """Group norm in float32 under autocast.

    Its backward pass in bfloat16 is slow on a CPU: with this one the UNet made 109 images a second
    on one core instead of 86.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; the result has the type of the input."""
        with torch.autocast(x.device.type, enabled=False):
            normed = F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)


def use_float32_norms(model: torch.nn.Module) -> None:
    """Let every group norm of the model compute in float32; the weights stay as they are."""
    for module in model.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = Float32GroupNorm


def warmup_stable_decay(step: int, steps: int, *, warmup: int = 200, decay: float = 0.15) -> float:
    """Factor of the learning rate at ``step``.

    Linear up over ``warmup`` steps, flat, then linear down to a hundredth over the last part
    ``decay`` of the steps.
    """
    left = (steps - step) / max(1.0, decay * steps)
    return min(1.0, (step + 1) / warmup, max(0.01, left))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate
