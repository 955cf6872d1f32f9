"""``hipa-evaluate``: the quality of an adaptor, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    ConfigOption,
    EmbeddingOption,
    LoraOption,
    ModelOption,
    OneStepOption,
    console,
)
from hipa_deploy.extras import require

NONE = "none"  # of --adaptor


def evaluate(
    adaptor: Annotated[
        str,
        typer.Option(
            help="Adaptor folder, or 'emoji' for the included one. none: no adaptor of HiPA. With "
            "--one-step, a one-step LoRA of others, or none for a model that is one-step itself."
        ),
    ] = "emoji",
    one_step: OneStepOption = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[FILE=]METHOD",
            help="Also compare a one-step LoRA of others: its file or folder, and its method as "
            "for --one-step. METHOD alone is the model itself. Repeat it for more.",
        ),
    ] = None,
    model: ModelOption = "emoji",
    config: ConfigOption = None,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="Training recipe, a name or a TOML file, whose multi-step settings (steps, "
            "guidance) the comparison uses."
        ),
    ] = "emoji",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one prompt a line, or a table of captions; by default the prompts "
            "that the model folder keeps aside."
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="How many images to compare.")] = 128,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this JSON file.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write a folder with report.md, frequency spectra and samples."),
    ] = None,
) -> None:
    """Measure an adaptor's image quality against the multi-step model.

    Compared on the same prompts and noise: the model with all its steps (the teacher), the model in
    one step, the model with the adaptor in one step, and with each rival.
    """
    require("train")
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.files import write_file
    from hipa_deploy.models.adaptor_folder import read_metadata
    from hipa_deploy.models.locate import model_folder
    from hipa_deploy.models.lora.open_style import OpenStyle
    from hipa_deploy.models.model_config import ModelConfig
    from hipa_deploy.models.style import check_same_loras, parse_style
    from hipa_deploy.train.evaluation import quality_report as quality
    from hipa_deploy.train.evaluation.rivals import check_rivals, make_rival, parse_rival
    from hipa_deploy.train.recipes.recipe import load_recipe

    folder = model_folder(model, config)
    teacher = quality.reference_teacher(load_recipe(recipe).teacher)
    adaptor_dir = None if adaptor == NONE else resolve_adaptor(adaptor)
    rivals = [parse_rival(text) for text in rival or ()]
    if one_step is not None:
        rivals.insert(0, make_rival(one_step, adaptor_dir, f"--one-step {one_step}"))
        adaptor_dir = None

    # Before minutes of the teacher's images: a wrong adaptor is reported at once.
    style = parse_style(lora, embedding)
    added = OpenStyle.read(style, ModelConfig.read(folder)).info
    if adaptor_dir is not None:
        metadata = read_metadata(adaptor_dir, folder)
        check_same_loras(adaptor_dir, metadata.loras, added.loras)
    check_rivals(rivals, folder, style)

    # Every kind of image is made from the same prompts and seeds, so that only the model differs.
    texts, _ = quality.draw(quality.held_out_prompts(folder, prompts), images)
    rows, again = quality.make_images(
        folder, adaptor_dir, texts, teacher, images, console, style, rivals
    )
    truth = rows[quality.teacher_row(teacher.steps)]
    report = quality.quality_report(teacher, texts, truth, again, rows)
    report = report.model_copy(update={"style": added})

    if json_path:
        write_file(json_path, (report.model_dump_json(indent=2) + "\n").encode())
    Console().print(quality.render_table(report))
    if out:
        typer.echo(quality.write_report(out, report, rows))
