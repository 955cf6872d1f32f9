"""The options of every command that makes images and takes a checker of the user's own.

They stand at the root because the service and the tables, which are below the other commands, have
them too.
"""

from __future__ import annotations

from typing import Annotated

import typer

CheckerOption = Annotated[
    str | None,
    typer.Option(
        "--checker",
        metavar="MODULE:FUNCTION",
        help="A function of yours that sees every image and may withhold it. Needs --allow-code.",
    ),
]
AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Let --checker run code. Its module is imported, so allow only what you trust.",
    ),
]
