"""What each of two processes runs in test_processes: every scenario in one launch.

Each process writes WORK/outcomes-INDEX.json: the outcome of each scenario, and what it printed.

    python two_processes.py MODEL CACHE WORK RECIPE
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from torch import distributed

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data import teacher_pairs as teacher_pairs_module
from hipa_deploy.train.loop import training_steps as run_module
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.recipes.held_out_settings import HeldOutSettings
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor

model, cache, work = (Path(argument) for argument in sys.argv[1:4])
recipe = Recipe.model_validate_json(sys.argv[4])
index = Processes.join(recipe, "cpu").index
group = distributed.distributed_c10d._get_default_group()
timeout = group._get_backend(torch.device("cpu")).options._timeout
outcomes: dict[str, str] = {"hours of patience": f"{timeout.total_seconds() / 3600:g}"}
original_batch_rows = run_module.batch_rows
original_write_file = teacher_pairs_module.write_file


def train(name: str, out: str, cache: Path = cache, recipe: Recipe = recipe) -> None:
    """Train, and record the outcome under ``name``."""
    screen = Console(file=io.StringIO())
    try:
        train_adaptor(recipe, model, work / out, cache=cache, device="cpu", console=screen)
        outcomes[name] = "done"
    except HipaError as error:
        outcomes[name] = f"error: {error}"
    outcomes[f"{name} printed"] = screen.file.getvalue()


def interrupt(count: int, batch: int, seed: int, step: int) -> object:
    """Press Ctrl-C in the second process, during step 3."""
    if step == 2 and index == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return original_batch_rows(count, batch, seed, step)


def full_disk(*_: object) -> None:
    """Fail in the second process as writing a shard to a full disk does."""
    if index == 1:
        raise OSError(28, "No space left on device")


train("unbroken", "unbroken", work / "cache")
run_module.batch_rows = interrupt
train("interrupted", "broken")
run_module.batch_rows = original_batch_rows
train("resumed", "broken")
teacher_pairs_module.write_file = full_disk
train("full disk", "full", work / "cache-full")
teacher_pairs_module.write_file = original_write_file
train("disagreeing", "other", recipe=recipe.model_copy(update={"seed": index}))
held_out = HeldOutSettings(
    prompts=str(work / "held-out.txt"), count=2, every=1, patience=1, min_delta=10
)
watched = recipe.model_copy(update={"held_out": held_out, "steps": 3})
train("early", "early", recipe=watched)
train("too small", "small", recipe=recipe.model_copy(update={"batch": 1}))
(work / f"outcomes-{index}.json").write_text(json.dumps(outcomes))
PartialState().destroy_process_group()
