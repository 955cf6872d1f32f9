"""A command whose help has its options in groups, two examples, and ``--version``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hipa_deploy.guide.option_groups import GROUP_OF, HELP_GROUP


def print_version(asked: bool) -> None:
    """Print the version of hipa-deploy and end, if the option was given."""
    if asked:
        typer.echo(f"hipa-deploy {version('hipa-deploy')}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version",
        is_eager=True,
        callback=print_version,
        help="Print the version of hipa-deploy and exit.",
    ),
]


def with_version(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option ``--version``, which ends before anything else is read."""

    @functools.wraps(command)
    def wrapped(*args: Any, version: bool = False, **kwargs: Any) -> None:
        del version  # its callback has done what there is to do
        command(*args, **kwargs)

    # Typer reads the options from the signature, and their types from the annotations.
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(
        "version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=VersionOption
    )
    parameters = [*signature.parameters.values(), option]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    annotations = inspect.get_annotations(command, eval_str=True)
    wrapped.__annotations__ = {**annotations, "version": VersionOption}
    return wrapped


class GuidedCommand(TyperCommand):
    """A command of hipa-deploy, as its help shows it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            for name in parameter.opts:
                if name in GROUP_OF:
                    parameter.rich_help_panel = GROUP_OF[name]  # type: ignore[attr-defined]

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments first, then the options of a group together, ``--version`` and ``--help`` last.

        The help shows a group where its first option stands.
        """
        arguments = []
        grouped: dict[str, list[Any]] = {}
        for parameter in super().get_params(ctx):
            if parameter.param_type_name == "argument":
                arguments.append(parameter)
                continue
            if "--help" in parameter.opts:
                parameter.rich_help_panel = HELP_GROUP  # type: ignore[attr-defined]
            group = getattr(parameter, "rich_help_panel", None) or ""
            grouped.setdefault(group, []).append(parameter)
        last = grouped.pop(HELP_GROUP, [])
        options = [option for group in grouped.values() for option in group]
        return [*arguments, *options, *last]
