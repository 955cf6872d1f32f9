"""Where a training's numbers and sample grids go: TensorBoard, and accelerate's trackers.

TensorBoard is written here rather than by accelerate's tracker, which flushes the file at every
step. The other trackers are accelerate's own classes. They are opened without its Accelerator, for
the reasons that processes.py gives.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.reading import MIB, read_text
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.train.loop.output import TRACKERS

TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-run-id"  # the file in TRACKERS that keeps it
PROJECT = "hipa-train"  # of W&B and others, unless WANDB_PROJECT names another


class Scalars:
    """A TensorBoard writer as a context manager; without a folder it records nothing.

    Args:
        folder: Where the event file goes; None in a process that does not write.
        step: The step that the run resumes from. TensorBoard then hides values of later steps,
            which a killed run wrote after its last checkpoint.
        console: Where a failure is told. As of other trackers, it does not end a training.

    Raises:
        HipaError: the folder cannot be written, as on a full disk.

    """

    def __init__(self, folder: Path | None, step: int, console: Console | None = None) -> None:
        self.folder = folder
        self.console = console
        self.writer: SummaryWriter | None = None
        self.excepthook = threading.excepthook
        if folder is None:
            return
        threading.excepthook = self._thread_failed
        try:
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            threading.excepthook = self.excepthook
            raise HipaError(
                f"{folder} cannot be written: {error.strerror}. "
                "Check its permissions and the free disk space."
            ) from None

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing flushes, which fails too on a full disk.
        with self._told_failure():
            if self.writer is not None:
                self.writer.close()
        if self.folder is not None:
            threading.excepthook = self.excepthook

    def add(self, values: dict[str, float], step: int) -> None:
        """Record the values of a step, by name."""
        with self._told_failure():
            for name, value in values.items():
                if self.writer is not None:
                    self.writer.add_scalar(name, value, step)

    def add_image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """Record an image, uint8 [H, W, 3]."""
        with self._told_failure():
            if self.writer is not None:
                self.writer.add_image(name, image_HWC, step, dataformats="HWC")

    @contextmanager
    def _told_failure(self) -> Iterator[None]:
        """Tell of a file that cannot be written, once, and record nothing more."""
        try:
            yield
        except OSError as error:
            self.writer = None
            _tell_failure(self.console, TENSORBOARD, error)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Keep quiet about the writer's own thread: its error is raised again by the next call."""
        is_writers = type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_writers and isinstance(failure.exc_value, OSError)):
            self.excepthook(failure)


class OtherTracker:
    """One of accelerate's trackers as a context manager.

    Once a training runs, a tracker that fails ends it not: the console says so, and nothing more
    is sent to it.

    Args:
        name: accelerate's name of it, such as 'wandb'.
        folder: The run folder.
        config: The recipe as 'table.key' -> value, which the tracker shows beside the run.
        console: Where a failure is told.

    Raises:
        HipaError: it cannot be opened.

    """

    def __init__(
        self, name: str, folder: Path, config: dict[str, Any], console: Console | None
    ) -> None:
        self.name = name
        self.console = console
        self.tracker: Any = None
        try:
            self.tracker = _open(name, folder)
            self.tracker.store_init_configuration(config)
        except Exception as error:
            raise _cannot_open(name, error) from None

    def __enter__(self) -> OtherTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._call("finish")

    def add(self, values: dict[str, float], step: int) -> None:
        """Record the values of a step, by name."""
        self._call("log", dict(values), step=step)

    def add_image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """Record an image, uint8 [H, W, 3], where the tracker takes images."""
        if hasattr(self.tracker, "log_images"):
            self._call("log_images", {name: image_HWC[None]}, step=step)

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, method)(*arguments, **options)
        except Exception as error:
            self.tracker = None
            _tell_failure(self.console, self.name, error)


def _tell_failure(console: Console | None, name: str, error: Exception) -> None:
    if console is not None:
        console.print(
            f"warning: tracker {name} failed ({type(error).__name__}: {first_line(error)}). "
            "The training goes on without it.",
            highlight=False,
        )


def log_in(names: Sequence[str]) -> None:
    """Log in to W&B before the slow work: trackers are opened after the teacher's images are made.

    Where W&B knows no key, a terminal is asked for one. With ``WANDB_MODE`` 'offline' or 'disabled'
    nothing is asked. The other trackers have no common way to log in.

    Args:
        names: of TENSORBOARD and accelerate's trackers.

    Raises:
        HipaError: there is no key, or W&B does not take it.

    """
    if "wandb" not in names:
        return
    wandb = import_module("wandb")
    try:
        wandb.login()
    except Exception as error:
        raise _cannot_open("wandb", error) from None


def _cannot_open(name: str, error: Exception) -> HipaError:
    return HipaError(
        f"tracker {name} cannot be opened ({type(error).__name__}: {first_line(error)}). "
        f"Log in to it first (W&B: run wandb login, or set WANDB_MODE=offline), or leave "
        f"--log-with {name} out."
    )


def _open(name: str, folder: Path) -> Any:
    """A started tracker of accelerate for the run of a folder."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    holder = folder / TRACKERS
    holder.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    if name == "wandb":
        title = folder.name.removesuffix(".run")
        run_id = wandb_run_id(folder)
        tracker = kind(project, dir=str(holder), id=run_id, name=title, resume="allow")
    elif kind.requires_logging_directory:
        tracker = kind(project, logging_dir=str(holder))
    else:
        tracker = kind(project)
    # Before accelerate 1.8 a tracker starts when it is made.
    start = getattr(tracker, "start", None)
    if start is not None:
        start()
    return tracker


def wandb_run_id(folder: Path) -> str:
    """The id of a training at W&B, which its run folder keeps for when it is resumed.

    It is drawn, and not made of the folder's name: W&B takes no step twice, so a second training
    in a folder of the same name, here or on another machine, would vanish in the first one's run.

    Args:
        folder: The run folder.

    """
    path = folder / TRACKERS / WANDB_ID
    if path.is_file():
        known = read_text(path, max_bytes=MIB).strip()
        if known:
            return known
    run_id = secrets.token_hex(8)
    # Until this file there was the folder's name. A training of then goes on in its own run.
    if (folder / TRACKERS / "wandb").is_dir():
        run_id = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    write_file(path, (run_id + "\n").encode())
    return run_id


class Trackers:
    """All trackers of a run as one context manager; a process that does not write has none.

    Args:
        folder: The run folder; None in a process that does not write.
        step: The step that the run resumes from.
        names: TENSORBOARD, and names of accelerate's trackers.
        config: The recipe as 'table.key' -> value.
        console: Where a tracker's failure is told.

    Raises:
        HipaError: a tracker cannot be opened.

    Example:
        >>> with Trackers(Path("adaptor.run"), 0, ["tensorboard", "wandb"], {}) as trackers:
        ...     trackers.add({"loss": 0.5}, step=1)

    """

    def __init__(
        self,
        folder: Path | None,
        step: int,
        names: Sequence[str],
        config: dict[str, Any],
        console: Console | None = None,
    ) -> None:
        self.stack = ExitStack()
        self.open: list[Scalars | OtherTracker] = []
        if folder is None:
            return
        for name in names:
            tracker: Scalars | OtherTracker
            if name == TENSORBOARD:
                tracker = Scalars(folder / TENSORBOARD, step, console)
            else:
                tracker = OtherTracker(name, folder, config, console)
            self.stack.enter_context(tracker)
            self.open.append(tracker)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def add(self, values: dict[str, float], step: int) -> None:
        """Record the values of a step, by name."""
        for tracker in self.open:
            tracker.add(values, step)

    def add_image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """Record an image, uint8 [H, W, 3]."""
        for tracker in self.open:
            tracker.add_image(name, image_HWC, step)
