"""One look for every progress bar of the training stage."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class ProgressBar(Progress):
    """Name, bar, count, elapsed and remaining time, with a line of text below them.

    Args:
        console: Where it is shown. Default: stderr.

    Example:
        >>> with ProgressBar() as progress:
        ...     task = progress.add_task("training", total=1000)
        ...     progress.note = "step 1  loss 0.512"
        ...     progress.update(task, completed=1)

    """

    def __init__(self, console: Console | None = None) -> None:
        self.note = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then the note."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)
