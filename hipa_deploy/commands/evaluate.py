"""``hipa-evaluate``: the quality of an adaptor, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    ConfigOption,
    ModelOption,
    console,
)
from hipa_deploy.extras import require

if TYPE_CHECKING:
    pass


def evaluate(
    adaptor: Annotated[
        str, typer.Option(help="Adaptor folder, or 'emoji' for the embedded one.")
    ] = "emoji",
    model: ModelOption = "emoji",
    config: ConfigOption = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose teacher's guidance to use.")] = "emoji",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file or table of captions; the model's held-out ones by default."),
    ] = None,
    images: Annotated[int, typer.Option(help="Images to compare.")] = 128,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.md with spectra, premise and samples.")
    ] = None,
) -> None:
    """Measure quality: teacher, base in one step and adaptor in one step, on the same prompts and noise."""
    require("train")
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.files import write_file
    from hipa_deploy.models.locate import model_folder
    from hipa_deploy.train.evaluation import quality_report as quality
    from hipa_deploy.train.recipes.recipe import load_recipe

    folder, teacher = (
        model_folder(model, config),
        quality.reference_teacher(load_recipe(recipe).teacher),
    )
    texts, _ = quality.draw(quality.held_out_prompts(folder, prompts), images)
    rows, again = quality.make_images(
        folder, resolve_adaptor(adaptor), texts, teacher, images, console
    )
    report = quality.quality_report(
        teacher, texts, rows[quality.teacher_row(teacher.steps)], again, rows
    )
    if json_path:
        write_file(json_path, (report.model_dump_json(indent=2) + "\n").encode())
    Console().print(quality.render_table(report))
    if out:
        typer.echo(quality.write_report(out, report, rows))
