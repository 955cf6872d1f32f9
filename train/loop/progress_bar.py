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
    """Name, bar, count, elapsed and remaining time, and below them a line of text; on stderr without a console."""

    def __init__(self, console: Console | None = None) -> None:
        self.note = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        super().__init__(
            *columns,
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then the note."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)
