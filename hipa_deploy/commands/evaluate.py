"""``hipa-evaluate``: the quality of an adaptor, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    ConfigOption,
    EmbeddingOption,
    ForceOption,
    LoraOption,
    ModelOption,
    OneStepOption,
    console,
)
from hipa_deploy.commands.outputs import check_outputs, write_output
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
        str | None,
        typer.Option(
            help="Training recipe, a name or a TOML file, whose multi-step settings (steps, "
            "guidance) the comparison uses. By default those that the adaptor was trained with."
        ),
    ] = None,
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
    context_tokens: Annotated[
        int | None,
        typer.Option(
            help="How many tokens of a prompt are read: 77, 154 or 231. By default as the adaptor "
            "was trained."
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            help="How many of the text encoder's last layers to leave out, counted as in "
            "diffusers. By default as the adaptor was trained."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Measure an adaptor's image quality against the multi-step model.

    Compared on the same prompts and noise: the model with all its steps (the teacher), the model in
    one step, the model with the adaptor in one step, and with each rival.
    """
    require("train")
    from hipa_deploy.bundle.text_settings import TextWishes
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.generate.prompt_files import check_prompt_file
    from hipa_deploy.models.locate import model_folder
    from hipa_deploy.models.style import parse_style
    from hipa_deploy.train.evaluation.evaluation_request import (
        REPORT_FILES,
        check_request,
        choose_teacher,
        held_out_prompts,
        make_rival,
        parse_rival,
        trained_on,
    )

    # Before minutes of the teacher's images, and before torch is imported: every mistake that the
    # options and the headers of files show. First what needs no model.
    adaptor_dir = None if adaptor == NONE else resolve_adaptor(adaptor)
    rivals = [parse_rival(text) for text in rival or ()]
    if one_step is not None:
        rivals.insert(0, make_rival(one_step, adaptor_dir, f"--one-step {one_step}"))
        adaptor_dir = None
    reference = choose_teacher(recipe, adaptor_dir, model)
    teacher = reference.teacher
    style = parse_style(lora, embedding)
    if prompts is not None:
        check_prompt_file(prompts)
    folder = model_folder(model, config)

    outputs = [json_path] if json_path else []
    if out:
        outputs += [out / name for name in REPORT_FILES]
    inputs = [folder]
    if recipe:
        inputs.append(Path(recipe))
    if adaptor_dir:
        inputs.append(adaptor_dir)
    if prompts:
        inputs.append(prompts)
    check_outputs(outputs, inputs=inputs, force=force)
    wishes = TextWishes(context_tokens, clip_skip)
    request = check_request(
        folder, adaptor_dir, rivals, style, wishes, prompts=prompts, images=images
    )
    if request.warning:
        console.print(f"warning: {request.warning}", markup=False, highlight=False)
    if adaptor_dir is not None and trained_on(adaptor_dir, held_out_prompts(folder, prompts)):
        console.print(
            f"warning: adaptor {adaptor_dir} was trained on these very prompts: the numbers say "
            "nothing of other prompts. Give prompts that it has not seen: --prompts FILE.",
            markup=False,
            highlight=False,
        )

    # Then what only torch can tell, still before the first image.
    from hipa_deploy.models.adaptor_folder import read_metadata, weights_sha256
    from hipa_deploy.models.lora.open_style import OpenStyle
    from hipa_deploy.models.model_config import ModelConfig
    from hipa_deploy.models.style import check_same_loras
    from hipa_deploy.train.evaluation import quality_report as quality
    from hipa_deploy.train.evaluation.rivals import check_rivals

    added = OpenStyle.read(style, ModelConfig.read(folder)).info
    if adaptor_dir is not None:
        check_same_loras(adaptor_dir, read_metadata(adaptor_dir).loras, added.loras)
    check_rivals(rivals, folder, style)

    # Every kind of image is made from the same prompts and seeds, so that only the model differs.
    texts = request.texts
    text = request.text
    rows, again = quality.make_images(
        folder, adaptor_dir, texts, teacher, images, console, style, rivals, text
    )
    truth = rows[quality.teacher_row(teacher.steps)]
    report = quality.quality_report(teacher, texts, truth, again, rows)
    source = reference.source
    if reference.differs:
        source += f", with {reference.differs}"
    known = {"style": added, "text": text, "teacher_from": source}
    if adaptor_dir is not None:
        known["adaptor_sha256"] = weights_sha256(adaptor_dir)
    report = report.model_copy(update=known)

    if json_path:
        write_output(json_path, (report.model_dump_json(indent=2) + "\n").encode(), force=force)
    Console().print(quality.render_table(report))
    for line in (quality.gap_line(report), *report.doubts):
        if line:
            Console().print(line, markup=False, highlight=False)
    if out:
        typer.echo(quality.write_report(out, report, rows, force=force))
