"""The commands. ``hipa VERB`` and ``hipa-VERB`` are the same; each function only parses, calls and prints."""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from hipa_deploy.commands import from_image as cli_tasks
from hipa_deploy.commands import profile as cli_profile
from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    BundleArgument,
    CountOption,
    HeightOption,
    OutOption,
    PromptsArgument,
    SeedOption,
    TruncateOption,
    WidthOption,
    console,
    image_paths,
    write_images,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require

if TYPE_CHECKING:
    from hipa_deploy.bundle.manifest import Bundle
    from hipa_deploy.engines.store.build_options import BuildOptions
    from hipa_deploy.train.recipe import Recipe


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


class Precision(str, Enum):
    """Weights and arithmetic inside the graphs."""

    fp16 = "fp16"
    fp32 = "fp32"


class Layout(str, Enum):
    """onestep: specialised graphs. generic: optimum's inputs and outputs."""

    onestep = "onestep"
    generic = "generic"


class Task(str, Enum):
    """What a bundle makes an image from."""

    generate = "generate"
    edit = "edit"
    inpaint = "inpaint"
    upscale = "upscale"


class EngineBackend(str, Enum):
    """What compiles and runs an engine."""

    rtx = "rtx"
    tensorrt = "tensorrt"


ModelOption = Annotated[
    str,
    typer.Option(
        help="Base model: a diffusers folder, a .safetensors file, a hub id, or 'emoji' (embedded)."
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        help="What a .safetensors checkpoint is: sd15 | sd21-base | sd21-v | a diffusers folder like it."
    ),
]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Adaptor folder (or decoder folder) to write.")],
    recipe: Annotated[
        str,
        typer.Option(help="A TOML file, or: emoji | emoji-decoder | sd15 | sd21-base | sd21-v."),
    ] = "emoji",
    model: ModelOption = "emoji",
    config: ConfigOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file or table of captions, in place of the recipe's.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Adaptor to continue from, or 'emoji'.")
    ] = None,
    adaptor: Annotated[
        str | None, typer.Option(help="For a decoder: the adaptor of its latents, or 'emoji'.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, in place of the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and what it takes, and stop.")
    ] = False,
) -> None:
    """Train a HiPA adaptor, or a tiny decoder by a recipe of that kind. To resume, run the same command again."""
    require("train")
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.models.locate import model_folder
    from hipa_deploy.train.loop.processes import is_main, parting
    from hipa_deploy.train.recipe import Recipe, load_any_recipe
    from hipa_deploy.train.train_adaptor import train_adaptor
    from hipa_deploy.train.train_decoder import train_decoder

    given = {"steps": steps, "prompts": prompts and str(prompts.absolute())}
    chosen = load_any_recipe(
        recipe, {key: value for key, value in given.items() if value is not None}
    )
    initial, active = (resolve_adaptor(name) if name else None for name in (start, adaptor))
    if isinstance(chosen, Recipe):
        if active:
            raise HipaError(
                f"--adaptor is for a decoder; recipe {recipe} trains an adaptor. See --from."
            )
        if dry_run:
            _dry_run_training(chosen, model_folder(model, config))
            return
        with parting():
            path = train_adaptor(
                chosen, model_folder(model, config), out, initial_adaptor=initial, console=console
            )
    else:
        if initial:
            raise HipaError(
                f"--from is for an adaptor; recipe {recipe} trains a decoder. Leave it out."
            )
        if dry_run:
            raise HipaError(
                f"--dry-run is for an adaptor; recipe {recipe} trains a decoder. Leave it out."
            )
        with parting():
            path = train_decoder(
                chosen, model_folder(model, config), out, adaptor=active, console=console
            )
    if is_main():
        typer.echo(path)


def _dry_run_training(recipe: Recipe, model_dir: Path) -> None:
    from hipa_deploy.engines.targets.target import load_target_profile, target_names
    from hipa_deploy.train.prediction.dry_run import dry_run

    gpus = [
        profile for profile in map(load_target_profile, target_names()) if not profile.memory_shared
    ]
    with console.status("predicting"):
        shown, problem = dry_run(recipe, model_dir, gpus)
    Console().print(*shown, sep="\n", markup=False, highlight=False)
    if problem:
        raise problem


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    model: ModelOption,
    config: ConfigOption = None,
    adaptor: Annotated[
        str | None, typer.Option(help="Adaptor folder, or 'emoji' for the embedded one.")
    ] = None,
    adaptor_scale: Annotated[
        float, typer.Option(help="1.0 merges the adaptor as it was trained.")
    ] = 1.0,
    dtype: Annotated[Precision, typer.Option(help="Precision inside the graphs.")] = Precision.fp16,
    layout: Annotated[
        Layout, typer.Option(help="onestep is specialised; generic loads in optimum.")
    ] = Layout.onestep,
    height: Annotated[
        int | None, typer.Option(help="Pixels; the model's own size by default.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels; the model's own size by default.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images a call makes, static.")] = 1,
    decoder: Annotated[
        str, typer.Option(help="full (the model's VAE) | tiny | an AutoencoderTiny folder.")
    ] = "full",
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="UNet and decoder in one stage.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Bake these prompts, one a line: no text encoder.")
    ] = None,
    dynamic: Annotated[
        str | None, typer.Option(help="Axes, as in batch=1:1:4,height=384:512:768,width=…")
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="The adaptor's own by default; generate without one.")
    ] = None,
    strengths: Annotated[
        str | None, typer.Option(help="Of an edit, as in 0.75,0.5; the adaptor's by default.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="full (the model's VAE) | tiny | an AutoencoderTiny folder.")
    ] = "full",
    build: Annotated[EngineBackend | None, typer.Option(help="Compile engines as well.")] = None,
    swap_for: Annotated[
        Path | None, typer.Option(help="Write only the weights that differ from this bundle's.")
    ] = None,
) -> None:
    """Export a one-step bundle: base model (+ adaptor) -> ONNX stages, checked against PyTorch."""
    require("export")
    if swap_for is not None:
        sizes = (height, width, dynamic, None if batch == 1 else batch)
        given = (
            *sizes,
            prompts,
            build,
            fuse or None,
            task,
            strengths,
            None if encoder == "full" else encoder,
        )
        if (dtype, layout) != (Precision.fp16, Layout.onestep) or any(
            value is not None for value in given
        ):
            raise HipaError(
                "--swap-for takes --model, --adaptor, --adaptor-scale and --decoder; the bundle has the rest."
            )
        _export_swap(model, adaptor, adaptor_scale, decoder, swap_for, out)
        return
    if build:
        from hipa_deploy.engines.build.build_bundle import check_tools

        check_tools(build.value)  # before minutes of export, not after
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.export.export_bundle import ExportOptions, export_bundle
    from hipa_deploy.export.graph.axes import parse_axes
    from hipa_deploy.export.task import parse_strengths
    from hipa_deploy.models.locate import resolve_decoder, resolve_encoder, unpacked

    model = unpacked(model, config)
    options = ExportOptions(
        model=model,
        out=out,
        adaptor=resolve_adaptor(adaptor) if adaptor else None,
        adaptor_scale=adaptor_scale,
        dtype=dtype.value,
        layout=layout.value,
        height=height,
        width=width,
        batch=batch,
        decoder=resolve_decoder(decoder, model),
        fuse=fuse,
        prompts=prompts,
        dynamic=parse_axes(dynamic) if dynamic else {},
        task=task.value if task else None,
        strengths=parse_strengths(strengths) if strengths else (),
        encoder=resolve_encoder(encoder),
    )
    bundle = export_bundle(options, console)
    for stage in bundle.manifest.stages:
        islands = f"; in FP32: {', '.join(stage.fp32_islands)}" if stage.fp32_islands else ""
        measured = f"{stage.parity.psnr_db:.1f} dB from PyTorch FP32 (ONNX Runtime, CPU)"
        console.print(f"{stage.spec.name}: {measured}{islands}", highlight=False)
    if build:
        from hipa_deploy.engines.store.build_options import BuildOptions

        _build(out, build, "auto", BuildOptions())
    typer.echo(out)


def _export_swap(
    model: str, adaptor: str | None, scale: float, decoder: str, bundle: Path, out: Path
) -> None:
    """An adaptor to swap in: everything but the adaptor and the decoder's folder is as in the bundle."""
    from hipa_deploy.embedded import resolve_adaptor, resolve_bundle
    from hipa_deploy.export.export_swap import SwapOptions, export_swap
    from hipa_deploy.models.locate import resolve_decoder

    if adaptor is None:
        raise HipaError("--swap-for needs --adaptor: the one whose weights to write.")
    swap = export_swap(
        SwapOptions(
            model=model,
            adaptor=resolve_adaptor(adaptor),
            adaptor_scale=scale,
            bundle=resolve_bundle(bundle),
            out=out,
            decoder=resolve_decoder(decoder, model),
        ),
        console,
    )
    measured = f"{swap.manifest.parity.psnr_db:.1f} dB from PyTorch FP32 (ONNX Runtime, CPU)"
    console.print(
        f"{swap.manifest.stage}: {len(swap.manifest.weights)} weights differ; {measured}",
        highlight=False,
    )
    typer.echo(out)


@app.command()
def build(
    bundle: BundleArgument,
    backend: Annotated[
        EngineBackend, typer.Option(help="rtx compiles on any machine; tensorrt on the device.")
    ],
    target: Annotated[
        str, typer.Option(help="auto, or a target's name: rtx30, rtx40, rtx50, orin-nano, …")
    ] = "auto",
    workspace: Annotated[
        int | None, typer.Option(help="MiB of GPU memory that a layer may use as scratch.")
    ] = None,
    tactic_dram: Annotated[
        int | None, typer.Option(help="MiB of host memory for the builder, on a Jetson.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 (builds fast) to 5 (runs fast).")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File; one per device and version by default.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Let the engine take another adaptor later.")
    ] = False,
    best_of: Annotated[
        int, typer.Option(help="Build so often, keep what this GPU runs fastest.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the memory plan and stop.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build what the plan says cannot fit.")
    ] = False,
) -> None:
    """Compile a bundle's stages into TensorRT engines."""
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.engines.store.build_options import BuildOptions

    given = {
        "workspace_mib": workspace,
        "tactic_dram_mib": tactic_dram,
        "optimization_level": optimization_level,
        "timing_cache": timing_cache,
        "refit": refit or None,
    }
    options = BuildOptions.model_validate(
        {name: value for name, value in given.items() if value is not None}
    )
    root = resolve_bundle(bundle)
    if dry_run:
        _dry_run(root, backend, target, options)
    else:
        _build(root, backend, target, options, best_of=best_of, force=force)


def _dry_run(root: Path, backend: EngineBackend, target: str, options: BuildOptions) -> None:
    from hipa_deploy.bundle.manifest import Bundle
    from hipa_deploy.engines.build.build_bundle import dry_run
    from hipa_deploy.engines.build.memory_plan import render_plan

    plan = dry_run(Bundle.open(root), backend=backend.value, target=target, options=options)
    Console().print(*render_plan(plan), sep="\n")
    plan.refuse_misfits()


def _build(
    root: Path, backend: EngineBackend, target: str, options: BuildOptions, **more: Any
) -> None:
    from hipa_deploy.bundle.manifest import Bundle
    from hipa_deploy.engines.build.build_bundle import build_bundle

    bundle = Bundle.open(root)
    built = build_bundle(
        bundle, backend=backend.value, target=target, options=options, console=console, **more
    )
    for engine in built:
        typer.echo(engine.path)
    _check_engines(bundle, backend.value)


def _check_engines(bundle: Bundle, backend: str) -> None:
    """Run what was built on the bundle's reference prompt, if it is for this machine."""
    from hipa_deploy.doctor.self_check import check_bundle
    from hipa_deploy.engines.store.select import runnable_flavour

    if runnable_flavour(bundle) != backend:
        console.print(
            "These engines are not for this machine. Where they run, check them: hipa-doctor BUNDLE"
        )
        return
    checked = check_bundle(bundle, backend)
    for name, check in checked.stages.items():
        console.print(f"{name}: {check}", highlight=False)
    if checked.problems:
        raise HipaError(
            f"{' '.join(checked.problems)} The engines remain. Run hipa-doctor --self-test for a report."
        )


@app.command()
def generate(
    bundle: BundleArgument,
    prompts: PromptsArgument,
    out: OutOption = Path("image.png"),
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
) -> None:
    """Generate images whose PNG metadata can reproduce them."""
    from hipa_deploy.generate.pipeline import OneStepPipeline, check_count

    check_count(len(prompts), count)
    paths = image_paths(out, len(prompts), count, seed)
    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend)
    with pipe:
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
        batches = pipe.stream(
            prompts, seed=seed, count=count, height=height, width=width, truncate=truncate
        )
        write_images(batches, paths)


cli_tasks.add_commands(app)


cli_profile.add_commands(app)


@app.command()
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
    from hipa_deploy.train.recipe import load_recipe

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


@app.command()
def doctor(
    subject: Annotated[
        str | None, typer.Argument(help="A bundle (or 'emoji'), which is run, or an engine.")
    ] = None,
    backend: BackendOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Build, run and time the embedded bundle.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the self-test's report here, for an issue.")
    ] = None,
) -> None:
    """Say what this machine can do and lacks; rerun a bundle's reference prompt and compare with its export."""
    if self_test:
        _self_test(subject, out, as_json)
    elif out:
        raise HipaError("--out is for --self-test. Add it, or leave --out away.")
    else:
        _examine(subject, backend, as_json)


def _examine(subject: str | None, backend: str, as_json: bool) -> None:
    from hipa_deploy.doctor.examine import examine, render

    with console.status("examining"):
        report = examine(subject, backend)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        Console().print(render(report))
    if report["problems"]:
        raise typer.Exit(1)


def _self_test(subject: str | None, out: Path | None, as_json: bool) -> None:
    from hipa_deploy.doctor.self_test import render_text, self_test
    from hipa_deploy.files import write_file

    if subject:
        raise HipaError("--self-test runs the embedded bundle. Leave SUBJECT out, or the option.")
    report = self_test(console)
    text = render_text(report)
    if out:
        write_file(out, text.encode())
    typer.echo(report.model_dump_json(indent=2) if as_json else text)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Continue from the shipped adaptor, few steps.")
    ] = False,
    task: Annotated[
        Task, typer.Option(help="generate trains; the others take their shipped adaptor.")
    ] = Task.generate,
) -> None:
    """Run the whole chain on the embedded model: train, merge, export, compile, generate, profile."""
    require("train", "export")
    if task is not Task.generate:
        if quick:
            raise HipaError(
                f"--quick shortens a training, and {task.value} trains nothing. Leave it away."
            )
        from hipa_deploy.demo.task_demo import run_task_demo

        run_task_demo(task.value, out, console=console)
        return
    from hipa_deploy.demo.training_demo import run_demo

    run_demo(out, quick=quick, console=console)


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
