"""``hipa VERB`` and ``hipa-VERB``: every command registered, and errors turned into exit codes."""

from __future__ import annotations

import codecs
import inspect
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from hipa_deploy.bulk.bulk_command import bulk
from hipa_deploy.commands.build import build
from hipa_deploy.commands.demo import demo
from hipa_deploy.commands.doctor import doctor
from hipa_deploy.commands.evaluate import evaluate
from hipa_deploy.commands.export import export
from hipa_deploy.commands.from_image import control, edit, inpaint, upscale
from hipa_deploy.commands.generate import generate
from hipa_deploy.commands.profile import profile, profile_compare, profile_table
from hipa_deploy.commands.train import train
from hipa_deploy.errors import (
    HipaError,
    HipaWarning,
    StoppedError,
    first_line,
    is_out_of_memory,
    printable,
)
from hipa_deploy.guide.foreign_options import why_not
from hipa_deploy.guide.guided_command import GuidedCommand, VersionOption, with_version
from hipa_deploy.guide.init import init
from hipa_deploy.guide.usage_examples import examples_text
from hipa_deploy.interrupts import interrupting_signal, signals_interrupt
from hipa_deploy.publish.publish_command import publish
from hipa_deploy.serve.process.command import serve
from hipa_deploy.standard_streams import (
    BROKEN_PIPE_CODE,
    caused_by_broken_pipe,
    is_broken,
    open_closed_streams,
    silence_broken_streams,
)
from hipa_deploy.triton.triton_command import triton

ABOUT = """Turn a multi-step text-to-image diffusion model into a one-step one, and run it fast.

hipa-train makes an adaptor: a small set of weights with which the model needs one step.

hipa-export makes a bundle: a folder of ONNX models, the adaptor merged, that runs without PyTorch.

hipa-build makes engines: a bundle's models compiled for one kind of NVIDIA GPU.

hipa-generate makes images from a bundle, with engines or on the CPU.

A small model named 'emoji' is included: hipa-generate emoji "3d emoji of a red apple"

Each command also runs as hipa-COMMAND. hipa COMMAND --help lists its options.
"""


class _Commands(TyperGroup):
    """Commands, of which some have a name of two words: ``profile compare``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two_words = " ".join(args[:2])
        if two_words in self.commands:
            args = [two_words, *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, before Click or Typer turns its exceptions into others.

        They take the end of a file for Ctrl-C, and each release treats Ctrl-C in its own way.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise StoppedError("stopped", interrupting_signal() or signal.SIGINT) from None
        except BrokenPipeError as error:
            # Click takes every closed pipe and socket for standard output.
            if is_broken():
                raise
            raise HipaError(
                f"a connection was closed by the other side ({first_line(error)}). Try again."
            ) from error
        except UnicodeEncodeError as error:
            # Python shows bytes of a name that are no UTF-8 as characters that have no encoding.
            if not any("\ud800" <= character <= "\udfff" for character in error.object):
                raise
            raise HipaError(
                f"{error.object!r} holds bytes that are no UTF-8. Rename the file or folder."
            ) from error
        except EOFError as error:
            raise HipaError(
                f"a file ends too early ({first_line(error)}). "
                "Check that the files which the command reads are complete."
            ) from error


app = typer.Typer(
    name="hipa",
    cls=_Commands,
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# ``hipa --help`` shows a panel for each of these, in this order.
START = "Start here"
CHAIN = "From a model to engines"
IMAGES = "Make images with a bundle"
MEASURE = "Measure and check"


def _register(command: Callable[..., None], panel: str, name: str | None = None) -> None:
    """Add a command under the name of its function (or ``name``), to one panel of the help."""
    # Typer prints a docstring's line breaks as they are. Here a paragraph is one long line, so that
    # it is wrapped to the width of the terminal.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    examples = examples_text(name or command.__name__)
    register = app.command(
        name, cls=GuidedCommand, help=text, epilog=examples, rich_help_panel=panel
    )
    register(with_version(command))


@app.callback()
def _hipa(version: VersionOption = False) -> None:
    """Take the option that ``hipa`` has of its own; the text of its help is ABOUT."""


_register(demo, START)
_register(init, START)
_register(train, CHAIN)
_register(export, CHAIN)
_register(build, CHAIN)
_register(publish, CHAIN)
_register(generate, IMAGES)
_register(edit, IMAGES)
_register(inpaint, IMAGES)
_register(upscale, IMAGES)
_register(control, IMAGES)
_register(serve, IMAGES)
_register(triton, IMAGES)
_register(bulk, IMAGES)
_register(profile, MEASURE)
_register(profile_compare, MEASURE, "profile compare")
_register(profile_table, MEASURE, "profile table")
_register(evaluate, MEASURE)
_register(doctor, MEASURE)


_MAX_LINE = 2000  # characters of an error
# Click's usage error. Typer before 0.20 depends on Click, later versions carry a copy of it; the
# base class of Typer's own error is the right one in both.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: list[str] | None = None) -> None:
    """Run ``hipa`` with these words, and exit with the command's code.

    A user's mistake is one line on stderr and exit code 1. Ctrl-C is exit code 130 and SIGTERM 143,
    with one line too. A bug keeps its traceback.

    Args:
        arguments: the words after ``hipa``; None takes them from ``sys.argv``.

    Raises:
        SystemExit: always.

    """
    open_closed_streams()
    if arguments is None:
        _use_utf8()
    # Set before anything imports these libraries: their notes are for developers, not for users.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    warnings.showwarning = _Warnings().show
    code = None
    problem: BaseException | None = None
    with signals_interrupt() as interruption:
        try:
            # standalone_mode would let Click print its own usage block; ours is one line.
            code = app(args=arguments, prog_name="hipa", standalone_mode=False)
            sys.stdout.flush()
        except BaseException as error:
            problem = error

    if isinstance(problem, StoppedError):
        _stop(str(problem), problem.exit_code)
    # Whatever a library made of the interruption: an error of its own, or nothing.
    if interruption.number is not None:
        _stop("stopped", 128 + interruption.number)
    if isinstance(problem, BrokenPipeError) or caused_by_broken_pipe(problem):
        silence_broken_streams()
        _stop(_told_of_broken_pipe(arguments), BROKEN_PIPE_CODE)
    if problem is not None:
        _stop_after(problem)
    # A command that ended with typer.Exit(n) returns n here.
    raise SystemExit(code if isinstance(code, int) else 0)


def _stop_after(problem: BaseException) -> NoReturn:
    """Exit with a line about an error that the user can mend, or raise it again: it is a bug."""
    if isinstance(problem, HipaError):
        _stop(str(problem))
    if isinstance(problem, _UsageError):
        _stop(_usage_message(problem))
    if isinstance(problem, OSError):
        # A full disk or a folder without write permission is for the user to fix, not a bug.
        reason = f"{problem.filename or 'a file'}: {problem.strerror or problem}"
        _stop(f"{reason}. Check the path, its permissions and the free disk space.")
    if is_out_of_memory(problem):
        # numpy says how much it wanted; others say nothing.
        detail = f" ({first_line(problem).rstrip('.')})" if str(problem) else ""
        _stop(f"not enough memory{detail}. Ask for less at once, or close other programs.")
    if isinstance(problem, (KeyboardInterrupt, typer.Abort)):
        _stop("stopped", 128 + signal.SIGINT)
    if isinstance(problem, SystemExit):
        # Only a library ends a command in this way, and its code may be 0.
        _stop(f"a library ended the command (exit code {problem.code}). The work is not done.")
    raise problem


def _told_of_broken_pipe(arguments: list[str] | None) -> str:
    """What to say where nobody reads standard output: nothing of a help, as ``| head`` cuts it."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or {"--help", "--version"} & set(words):
        return ""
    return "nothing reads the output any more, so the command stopped. The work may not be done."


def _usage_message(error: Any) -> str:
    """What is wrong with a command line; of an option that other tools have, why it is not here."""
    option = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    if option and context is not None:
        reason = why_not(option, context.info_name)
        if reason:
            return reason
    # typer 0.29 checks values through pydantic, which begins its messages so.
    return str(error.format_message()).replace(": Value error, ", ": ", 1)


def _use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale knows nothing but ASCII.

    Under ``LC_ALL=C`` and without that mode, Python gives every name with other characters in a
    form that ONNX Runtime, TensorRT, tokenizers and safetensors refuse. From Python 3.15 the mode
    is the default (PEP 686).
    """
    is_ascii = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if is_ascii and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])

    # A name that is no UTF-8 is printed as the bytes that it has.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")


def _stop(message: str, code: int = 1) -> NoReturn:
    """Write ``message`` to stderr as one line and exit with ``code``.

    It is empty after bare ``hipa``, which has printed its help.
    """
    line = printable(" ".join(message.split()))
    if len(line) > _MAX_LINE:
        # What is wrong stands first, and what to do last: a value in between is long.
        line = f"{line[: _MAX_LINE // 2]} … {line[-_MAX_LINE // 2 :]}"
    if line:
        # Where nobody reads it either, the exit code alone is left to say it.
        with suppress(BrokenPipeError):
            sys.stderr.write(f"hipa: {line}\n")
            sys.stderr.flush()
    raise SystemExit(code)


class _Warnings:
    """Prints what is meant for the user as one line, once, and other warnings as Python does.

    Python tells a warning once for each line of code that it is blamed on. A check before the slow
    work and the work itself are two.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Print a warning; the arguments are those of ``warnings.showwarning``."""
        if not issubclass(category, HipaWarning):
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
            return
        text = " ".join(str(message).split())
        if text not in self._told:
            self._told.add(text)
            sys.stderr.write(f"hipa: warning: {text}\n")


def verb_main() -> None:
    """Run ``hipa-VERB``: the script's own name says the verb."""
    _use_utf8()
    verb = Path(sys.argv[0]).stem.removeprefix("hipa-")
    main([verb, *sys.argv[1:]])
