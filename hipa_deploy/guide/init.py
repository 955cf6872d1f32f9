"""``hipa init``: five questions, and the commands that lead from a model to images on a device."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from hipa_deploy.errors import HipaError
from hipa_deploy.guide.questions import QUESTIONS, Question
from hipa_deploy.guide.route import Answers, route


def init(
    device: Annotated[
        str | None,
        typer.Option(
            help="Where images will be made: cpu | geforce | datacenter | orin-nano | orin-nx | "
            "agx-orin | thor."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a diffusers folder, a .safetensors or .ckpt file, a Hugging Face "
            "hub id, or 'emoji' (included)."
        ),
    ] = None,
    adaptor: Annotated[
        str | None,
        typer.Option(help="Adaptor folder or one-step LoRA file that you have, or none."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="What to make images from: generate | edit | inpaint | upscale | control."
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option(help="What matters most: quality | speed | memory."),
    ] = None,
) -> None:
    """Ask five questions, and print the commands from your model to images on your device.

    Nothing is installed or changed. A question whose answer is given as an option is not asked.
    """
    given = {
        "device": device,
        "model": model,
        "adaptor": adaptor,
        "task": task,
        "prefer": prefer,
    }
    answers = {}
    for question in QUESTIONS:
        value = given[question.name]
        answers[question.name] = question.check(value) if value is not None else _ask(question)
    for step in route(Answers(**answers)):
        typer.echo(f"\n# {step.title}")
        for words in step.commands:
            typer.echo(words if isinstance(words, str) else shlex.join(words))


def _ask(question: Question) -> str:
    """Ask one question on the terminal, again until the answer is one.

    Raises:
        HipaError: there is no terminal to ask on.

    """
    if not _has_terminal():
        raise HipaError(
            f"{question.option} is missing, and there is no terminal to ask on. Expected "
            f"{question.expected}. Give it as an option."
        )
    typer.echo(f"\n{question.text}", err=True)
    for choice, meaning in question.choices.items():
        typer.echo(f"  {choice:<12}{meaning}", err=True)
    while True:
        value = typer.prompt(question.name, default=question.default, err=True)
        try:
            return question.check(value)
        except HipaError as error:
            typer.echo(str(error), err=True)


def _has_terminal() -> bool:
    """Whether questions can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()
