from __future__ import annotations

import io

from rich.console import Console

from hipa_deploy.train.loop.progress_bar import ProgressBar


def test_the_note_stands_below_the_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressBar(console) as progress:
        task = progress.add_task("training", total=4)
        progress.update(task, completed=2)
        progress.note = "step 2  loss 0.500"
    lines = console.file.getvalue().splitlines()
    bar = max(index for index, line in enumerate(lines) if "2/4" in line)
    assert "step 2  loss 0.500" in lines[bar + 1]
