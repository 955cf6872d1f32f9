"""``hipa-evaluate``: the quality of an adaptor, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hipa_deploy.commands.files.outputs import check_outputs, write_output
from hipa_deploy.commands.options import (
    ConfigOption,
    EmbeddingOption,
    ForceOption,
    LoraOption,
    ModelOption,
    OneStepOption,
    VaeOption,
    console,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require

if TYPE_CHECKING:
    from hipa_deploy.bundle.text_settings import TextWishes
    from hipa_deploy.models.style import Style
    from hipa_deploy.train.coco.coco_request import CocoWishes
    from hipa_deploy.train.evaluation.contenders import Contender
    from hipa_deploy.train.recipes.recipe import TeacherSettings

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
            metavar="[FILE=]METHOD|FOLDER",
            help="Also compare: a one-step LoRA of others, as its file or folder and its method as "
            "for --one-step (METHOD alone is the model itself); or a folder: another adaptor of "
            "HiPA, an exported bundle, or images named by the prompts' numbers. Repeat it for "
            "more.",
        ),
    ] = None,
    model: ModelOption = "emoji",
    config: ConfigOption = None,
    vae: VaeOption = None,
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
    images: Annotated[
        int | None,
        typer.Option(
            help="How many images to compare: 128 by default, with --coco as many as the tables of "
            "the papers (30,000 of COCO 2014, 5,000 of 2017)."
        ),
    ] = None,
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
    coco: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Measure FID and CLIP score on MS-COCO in place of the report: a folder with "
            "annotations/captions_val2014.json and val2014, or those of 2017, or both. --out keeps "
            "the images; the same command goes on after an interruption.",
        ),
    ] = None,
    year: Annotated[
        int | None, typer.Option(help="With --coco: 2014 or 2017. By default what DIR has.")
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --coco: the weights that FID is defined with, NVIDIA's "
            "inception-2015-12-05.pt.",
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --coco: a CLIP of transformers, for the CLIP score. Without it there is no "
            "such column.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER/COUNT",
            help="With --coco: do one of COUNT equal parts, from 0/COUNT on. Run each part as a "
            "process, then the command without --shard for the report.",
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            metavar="random|first|FILE",
            help="With --coco: of each drawn image a random caption (the default) or its first; or "
            "a text file, one caption a line, such as the lists that DMD2 and SwiftBrush v2 "
            "publish.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="all|captioned",
            help="With --coco: the real images: all of the validation set (the default), or those "
            "whose captions are used.",
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="With --coco: to how many pixels real and generated images are scaled; 256 by "
            "default."
        ),
    ] = None,
    clip_prefix: Annotated[
        str | None,
        typer.Option(
            help="With --coco: put before each caption for the CLIP score; by default "
            "'A photo depicts '."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="With --coco: how many images are made at once; 8 by default."),
    ] = None,
    with_teacher: Annotated[
        bool, typer.Option("--with-teacher", help="With --coco: measure the multi-step model too.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Measure an adaptor's image quality against the multi-step model, or on MS-COCO.

    Compared on the same prompts and noise: the model with all its steps (the teacher), the model in
    one step, the model with the adaptor in one step, and with each rival.

    With --coco: FID-5k of COCO 2017, FID-30k and CLIP score of COCO 2014, as the papers' tables
    have them.
    """
    require("train")
    from hipa_deploy.bundle.text_settings import TextWishes
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.generate.prompt_files import check_prompt_file
    from hipa_deploy.models.locate import check_model_name, model_folder
    from hipa_deploy.models.lora.early_lora import check_before_model
    from hipa_deploy.models.style import parse_style
    from hipa_deploy.train.evaluation.contenders import (
        check_contender_files,
        contender_path,
        make_rival,
        parse_contender,
    )
    from hipa_deploy.train.evaluation.evaluation_request import (
        REPORT_FILES,
        check_request,
        choose_teacher,
        draw,
        held_out_prompts,
        trained_on,
    )

    # Before minutes of the teacher's images, and before torch is imported: every mistake that the
    # options and the headers of files show. First what needs no model.
    check_model_name(model)
    adaptor_dir = None if adaptor == NONE else resolve_adaptor(adaptor)
    rivals = [parse_contender(text) for text in rival or ()]
    if one_step is not None:
        rivals.insert(0, make_rival(one_step, adaptor_dir, f"--one-step {one_step}"))
        adaptor_dir = None
    comparison = choose_teacher(recipe, adaptor_dir, model)
    teacher = comparison.teacher
    style = parse_style(lora, embedding)
    wishes = TextWishes(context_tokens, clip_skip)
    coco_options = {
        "year": year,
        "inception": inception,
        "clip": clip,
        "shard": shard,
        "captions": captions,
        "reference": reference,
        "resolution": resolution,
        "clip_prefix": clip_prefix,
        "batch": batch,
        "with_teacher": with_teacher or None,
    }
    given = {name: value for name, value in coco_options.items() if value is not None}
    if coco is not None:
        if recipe is not None and not with_teacher:
            raise HipaError(
                f"--recipe {recipe} sets the multi-step model, which --coco measures only with "
                "--with-teacher. Add that, or leave out --recipe."
            )
        coco_wishes = _coco_wishes(coco, images, given)
        _on_coco(
            coco_wishes, model, config, vae, adaptor_dir, rivals, style, wishes, teacher,
            out=out, prompts=prompts, json_path=json_path, force=force,
        )  # fmt: skip
        return
    if given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise HipaError(f"{option} is for --coco. Give --coco DIR too, or leave it out.")
    images = 128 if images is None else images
    if prompts is not None:
        check_prompt_file(prompts)
    check_contender_files(rivals)
    check_before_model(model, style, adaptor_dir)

    # Before a checkpoint is converted, which takes minutes.
    outputs = [json_path] if json_path else []
    if out:
        outputs += [out / name for name in REPORT_FILES]
    inputs = [Path(model), *(path for path in map(contender_path, rivals) if path)]
    if recipe:
        inputs.append(Path(recipe))
    if adaptor_dir:
        inputs.append(adaptor_dir)
    if prompts:
        inputs.append(prompts)
    check_outputs(outputs, inputs=inputs, force=force)
    folder = model_folder(model, config, vae)
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
    from hipa_deploy.train.evaluation.rivals import check_rivals, contender_facts

    base = ModelConfig.read(folder)
    added = OpenStyle.read(style, base).info
    size = None
    if adaptor_dir is not None:
        metadata = read_metadata(adaptor_dir)
        check_same_loras(adaptor_dir, metadata.loras, added.loras)
        size = metadata.resolution
        base.latents_of(size)
        if size != base.native_size:
            console.print(
                f"All images have {size[1]}x{size[0]} pixels, as the adaptor was trained.",
                markup=False,
                highlight=False,
            )
    check_rivals(rivals, folder, style, size)
    texts, seeds = draw(request.texts, images)
    text = request.text
    facts = {one.row: contender_facts(one, folder, texts, seeds, text) for one in rivals}

    # Every kind of image is made from the same prompts and seeds, so that only the model differs.
    rows, again = quality.make_images(
        folder, adaptor_dir, texts, teacher, images, console, style, rivals, text
    )
    truth = rows[quality.teacher_row(teacher.steps)]
    report = quality.quality_report(teacher, texts, truth, again, rows, facts)
    source = comparison.source
    if comparison.differs:
        source += f", with {comparison.differs}"
    known = {"style": added, "text": text, "teacher_from": source}
    if adaptor_dir is not None:
        known["adaptor_sha256"] = weights_sha256(adaptor_dir)
    report = report.model_copy(update=known)

    if json_path:
        write_output(json_path, (report.model_dump_json(indent=2) + "\n").encode(), force=force)
    Console().print(quality.render_table(report))
    for line in (quality.gap_line(report), *report.doubts, *quality.row_notes(report)):
        if line:
            Console().print(line, markup=False, highlight=False)
    if out:
        typer.echo(quality.write_report(out, report, rows, force=force))


def _on_coco(
    wishes: CocoWishes,
    model: str,
    config: str | None,
    vae: str | None,
    adaptor: Path | None,
    rivals: list[Contender],
    style: Style,
    text_wishes: TextWishes,
    teacher: TeacherSettings,
    *,
    out: Path | None,
    prompts: Path | None,
    json_path: Path | None,
    force: bool,
) -> None:
    """The measurement on COCO: one report for each set that is there."""
    from hipa_deploy.models.locate import model_folder
    from hipa_deploy.models.lora.early_lora import check_before_model
    from hipa_deploy.train.coco.coco_folder import read_coco
    from hipa_deploy.train.coco.coco_request import REPORT_FILES, check_coco
    from hipa_deploy.train.evaluation.contenders import check_contender_files, contender_path
    from hipa_deploy.train.evaluation.evaluation_request import check_models

    request = check_coco(wishes, out, prompts)
    if adaptor is None and not rivals and not wishes.with_teacher:
        raise HipaError("there is nothing to measure. Give --adaptor, --rival or --with-teacher.")
    if json_path is not None and len(request.sets) > 1:
        raise HipaError(f"--json {json_path} is for one report. Choose one of the sets: --year.")
    check_contender_files(rivals)
    check_before_model(model, style, adaptor)
    inputs = [Path(model), wishes.folder, request.inception]
    inputs += [path for path in map(contender_path, rivals) if path]
    outputs = [json_path] if json_path else []
    if request.report:
        outputs += [one / name for one in request.sets for name in REPORT_FILES]
    check_outputs(outputs, inputs=inputs, force=force)
    folder = model_folder(model, config, vae)
    text, warning = check_models(folder, adaptor, rivals, style, text_wishes)
    if warning:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    read = {}
    for place, known in request.sets.items():
        with console.status(f"reading COCO {known.year}"):
            read[place] = read_coco(
                wishes.folder,
                known,
                captions=wishes.captions,
                reference=request.reference,
                images=wishes.images,
            )

    # Then what only torch can tell, still before the first image.
    from hipa_deploy.models.adaptor_folder import read_metadata
    from hipa_deploy.models.lora.open_style import OpenStyle
    from hipa_deploy.models.model_config import ModelConfig
    from hipa_deploy.models.style import check_same_loras
    from hipa_deploy.train.coco import coco_report as reports
    from hipa_deploy.train.coco.entries import Models
    from hipa_deploy.train.coco.run_coco import Contest, measure_on_coco, write_coco_report
    from hipa_deploy.train.evaluation.rivals import check_rivals

    size = None
    if adaptor is not None:
        added = OpenStyle.read(style, ModelConfig.read(folder)).info
        metadata = read_metadata(adaptor)
        check_same_loras(adaptor, metadata.loras, added.loras)
        size = metadata.resolution
    check_rivals(rivals, folder, style, size)
    models = Models(folder, style, text, size)
    contest = Contest(models, adaptor, rivals, teacher if wishes.with_teacher else None)
    for place, data in read.items():
        report = measure_on_coco(place, data, wishes, request, contest, console)
        if report is None:
            continue
        Console().print(reports.coco_table(report))
        lines = [*reports.warnings_of(report), *reports.difference_lines(report)]
        for line in lines:
            Console().print(line, markup=False, highlight=False)
        if json_path:
            content = (report.model_dump_json(indent=2) + "\n").encode()
            write_output(json_path, content, force=force)

        def write(path: Path, content: bytes) -> Path:
            return write_output(path, content, force=force)

        typer.echo(write_coco_report(place, report, write))


def _coco_wishes(folder: Path, images: int | None, given: dict[str, Any]) -> CocoWishes:
    """What was asked for with --coco; what was not has its default."""
    from hipa_deploy.train.coco.coco_request import CocoWishes

    return CocoWishes(folder=folder, images=images, **given)
