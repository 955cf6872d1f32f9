"""The commands. ``hipa VERB`` and ``hipa-VERB`` are the same; each function only parses, calls and prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from hipa_deploy.commands.build import build
from hipa_deploy.commands.demo import demo
from hipa_deploy.commands.doctor import doctor
from hipa_deploy.commands.evaluate import evaluate
from hipa_deploy.commands.export import export
from hipa_deploy.commands.from_image import edit, inpaint, upscale
from hipa_deploy.commands.generate import generate
from hipa_deploy.commands.profile import profile, profile_compare, profile_table
from hipa_deploy.commands.train import train
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    pass


class _Commands(TyperGroup):
    """Commands, of which some have a name of two words: ``profile compare``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (two := " ".join(args[:2])) in self.commands:
            args = [two, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="hipa",
    cls=_Commands,
    help="One-step text-to-image: train, merge, export, compile, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In the order in which --help lists them: along the chain, then what runs a bundle, then what measures it.
app.command()(train)
app.command()(export)
app.command()(build)
app.command()(generate)
app.command()(edit)
app.command()(inpaint)
app.command()(upscale)
app.command()(profile)
app.command("profile compare")(profile_compare)
app.command("profile table")(profile_table)
app.command()(evaluate)
app.command()(doctor)
app.command()(demo)


# Click's usage error, whichever copy of Click this Typer stands on (a dependency before 0.20, its own after).
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``hipa``. A user's mistake is one line and exit code 1; a bug keeps its traceback."""
    os.environ.setdefault(
        "DIFFUSERS_VERBOSITY", "error"
    )  # before any import of it: its notes are not for our users
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(args=arguments, prog_name="hipa", standalone_mode=False)
    except HipaError as error:
        _stop(str(error))
    except _UsageError as error:
        _stop(error.format_message())  # type: ignore[attr-defined]
    except OSError as error:  # a full disk, a folder that may not be written: the user's to mend
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("hipa: stopped\n")
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _stop(message: str) -> NoReturn:
    """Say it in one line, if there is anything to say (bare ``hipa`` has printed its help), and exit with 1."""
    if message.strip():
        sys.stderr.write(f"hipa: {' '.join(message.split())}\n")
    raise SystemExit(1)


def verb_main() -> None:
    """Entry point of every ``hipa-VERB``: the command's name says the verb."""
    main([Path(sys.argv[0]).stem.removeprefix("hipa-"), *sys.argv[1:]])
