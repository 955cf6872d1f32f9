"""One training at a time in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from hipa_deploy.disk.files import check_writable
from hipa_deploy.disk.locks import locked
from hipa_deploy.extras import require
from hipa_deploy.train.loop.output import LOCK, check_output, check_run_folder, run_folder
from hipa_deploy.train.loop.processes import Processes

_PATHS = ("initial_adaptor", "adaptor", "cache")  # arguments with names

Train = TypeVar("Train", bound=Callable[..., Path])


def one_run_at_a_time(train: Train) -> Train:
    """Hold the lock of the run folder during ``train(recipe, model_dir, out, *, device, …)``.

    Under a launcher the main process holds it for all. ``train`` gets a ``Path`` where its caller
    gave one as text.
    """

    @wraps(train)
    def alone(recipe: Any, model_dir: str | Path, out: str | Path, **more: Any) -> Path:
        require("train")
        out = Path(out)
        check_output(out, recipe)
        processes = Processes.join(recipe, more.get("device"))
        with ExitStack() as stack:
            with processes.fail_together():
                if processes.is_main:
                    stack.enter_context(_locked(run_folder(out)))
            for name in _PATHS:
                if more.get(name) is not None:
                    more[name] = Path(more[name])
            return train(recipe, Path(model_dir), out, **more)

    return cast(Train, alone)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if necessary, and removed if it stays empty.

    Raises:
        HipaError: another training holds it, or the folder is none of a training.

    """
    check_run_folder(folder)
    check_writable(folder / LOCK)
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "Wait until it ends, or choose another output folder."
    try:
        with locked(folder / LOCK, f"run folder {folder}", remedy):
            yield
    finally:
        with suppress(OSError):  # it is not empty: a checkpoint is kept
            folder.rmdir()
