"""``hipa-export``: a base model and an adaptor become a bundle."""

from __future__ import annotations

import gc
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.commands.build import build_engines
from hipa_deploy.commands.options import (
    ConfigOption,
    EmbeddingOption,
    EngineBackend,
    ForOption,
    Layout,
    LoraOption,
    ModelOption,
    OneStepOption,
    Precision,
    Task,
    VaeOption,
    chosen_adaptor,
    console,
    given_options,
)
from hipa_deploy.disk.files import refuse_to_overwrite
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require

if TYPE_CHECKING:
    from hipa_deploy.bundle.manifest import Parity
    from hipa_deploy.fit.target_choice import TargetChoice
    from hipa_deploy.models.style import Style


def export(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Bundle folder to write, new or empty.")],
    model: ModelOption,
    config: ConfigOption = None,
    vae: VaeOption = None,
    adaptor: Annotated[
        str | None,
        typer.Option(
            help="Adaptor to merge into the model: a folder that hipa-train wrote, a one-step LoRA "
            "of others (see --one-step), or an included one: emoji, emoji-edit, emoji-inpaint, "
            "emoji-upscale. None by default."
        ),
    ] = None,
    adaptor_scale: Annotated[
        float,
        typer.Option(help="How strongly to merge the adaptor; 1.0 is as it was trained."),
    ] = 1.0,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    one_step: OneStepOption = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of weights and arithmetic in the ONNX models.")
    ] = Precision.fp16,
    layout: Annotated[
        Layout,
        typer.Option(
            help="onestep: models specialised for one step, the fastest. generic: inputs and "
            "outputs as optimum-onnx expects them."
        ),
    ] = Layout.onestep,
    height: Annotated[
        int | None,
        typer.Option(help="Image height in pixels; by default the adaptor's, or the model's own."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Image width in pixels; by default the adaptor's, or the model's own."),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="How many images the models make at once, always.")
    ] = 1,
    decoder: Annotated[
        str,
        typer.Option(
            help="full: the model's own image decoder. tiny: a smaller, faster one. "
            "Or an AutoencoderTiny folder, such as hipa-train wrote."
        ),
    ] = "full",
    for_target: ForOption = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Join UNet and decoder into one ONNX model."),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one prompt a line, or a table of captions (.csv, .parquet): the "
            "bundle then makes these prompts only, and needs no text encoder."
        ),
    ] = None,
    reference_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of yours, in a file as for --prompts: the export compares every model "
            "with PyTorch on up to 8 of them, and reports the worst. By default on one prompt."
        ),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            help="Which of batch, height and width may vary, as NAME=min:usual:max, separated by "
            "commas. For example: height=384:512:768. None by default."
        ),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="What the bundle is for; by default what the adaptor was trained for, "
            "generate without one."
        ),
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            help="Task edit only: the strengths that hipa-edit may use, as in 0.75,0.5; "
            "by default those that the adaptor was trained for."
        ),
    ] = None,
    controlnet: Annotated[
        list[str] | None,  # one: a second is refused, not taken in its place
        typer.Option(
            metavar="CONTROLNET",
            help="Task control: the ControlNet that reads control images, for hipa-control. A "
            "ControlNetModel folder, a file such as control_v11p_sd15_canny.pth, or a hub id.",
        ),
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(
            help="Tasks edit, inpaint and upscale only: the image encoder. full: the model's own. "
            "tiny: a smaller one. Or an AutoencoderTiny folder."
        ),
    ] = "full",
    context_tokens: Annotated[
        int | None,
        typer.Option(
            help="How many tokens of a prompt are read: 77, 154 or 231. By default what the "
            "adaptor was trained with, 77 without one."
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            help="How many of the text encoder's last layers to leave out, counted as in "
            "diffusers: AUTOMATIC1111's Clip skip 2 is 1 for SD 1.x, and 0 for SDXL. By default as "
            "the adaptor was trained, 0 without one."
        ),
    ] = None,
    prompt_weights: Annotated[
        bool | None,
        typer.Option(
            "--prompt-weights/--no-prompt-weights",
            help="Read (word:1.3), (word) and square brackets as weights, as AUTOMATIC1111's web "
            "UI does: in --prompts, and later in hipa-generate. By default as the adaptor was "
            "trained, as text without one.",
        ),
    ] = None,
    with_teacher: Annotated[
        bool,
        typer.Option(
            "--with-teacher",
            help="Also write the model without the adaptor, so that hipa-generate --refine can "
            "make the final image of a draft in many steps. Nearly doubles the bundle.",
        ),
    ] = False,
    build: Annotated[
        EngineBackend | None,
        typer.Option(help="Also compile engines for this machine, as hipa-build does."),
    ] = None,
    swap_for: Annotated[
        Path | None,
        typer.Option(
            help="Write no bundle, but only the weights in which this adaptor differs from the "
            "given bundle, for hipa-generate --adaptor."
        ),
    ] = None,
    mark: Annotated[
        list[str] | None,
        typer.Option(
            help="How the bundle's images are marked, whoever makes them: watermark, watermark=HEX "
            "(your own number), c2pa (files only with signed content credentials), no-provenance, "
            "no-safety (leave out the model's safety checker). May be repeated."
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY",
            help="Sign what is written with this Ed25519 private key, in PEM. Devices that set "
            "HIPA_PUBLIC_KEY to the public key take nothing else.",
        ),
    ] = None,
) -> None:
    """Export a model, with an adaptor merged, as a bundle of ONNX models.

    Each model is run with ONNX Runtime and compared with PyTorch; the bundle is written only if the
    results agree. The bundle runs without PyTorch.
    """
    require("export")
    from hipa_deploy.models.locate import check_controlnet_name, check_model_name
    from hipa_deploy.models.style import parse_style

    check_model_name(model)
    control = _only_controlnet(controlnet)
    if control is not None:
        check_controlnet_name(control)
    if swap_for is not None:
        others_are_default = (
            dtype is Precision.fp16
            and layout is Layout.onestep
            and batch == 1
            and not fuse
            and not with_teacher
            and encoder == "full"
            and all(
                value is None
                for value in (
                    height,
                    width,
                    prompts,
                    reference_prompts,
                    dynamic,
                    task,
                    strengths,
                    build,
                    for_target,
                    context_tokens,
                    clip_skip,
                    prompt_weights,
                    mark,
                )
            )
        )
        if not others_are_default:
            raise HipaError(
                "--swap-for takes --model, --config, --vae, --adaptor, --adaptor-scale, "
                "--one-step, --lora, --embedding, --decoder, --controlnet, --sign and --out; the "
                "bundle decides everything else. Leave the other options out."
            )
        style = parse_style(lora, embedding)
        _export_swap(
            model,
            config,
            vae,
            adaptor,
            adaptor_scale,
            one_step,
            style,
            decoder,
            control,
            swap_for,
            out,
            sign,
        )
        return

    choice = None
    if for_target is not None:
        choice = _choose_for(for_target, context, layout, build)
        dtype = Precision(choice.values.get("--dtype", dtype))
        decoder = choice.values.get("--decoder", decoder)
        batch = choice.values.get("--batch", batch)

    from hipa_deploy.export.export_options import ExportOptions
    from hipa_deploy.export.export_request import check_options, check_request
    from hipa_deploy.export.graph.axes import parse_axes
    from hipa_deploy.export.task import parse_strengths
    from hipa_deploy.marks.records import parse_marks
    from hipa_deploy.models.locate import (
        resolve_controlnet,
        resolve_decoder,
        resolve_encoder,
        unpacked,
    )

    marks, safety = parse_marks(mark or [])
    options = ExportOptions(
        model=model,
        out=out,
        adaptor=chosen_adaptor(adaptor),
        adaptor_scale=adaptor_scale,
        dtype=dtype.value,
        layout=layout.value,
        height=height,
        width=width,
        batch=batch,
        fuse=fuse,
        prompts=prompts,
        reference_prompts=reference_prompts,
        dynamic=parse_axes(dynamic) if dynamic else {},
        task=task.value if task else None,
        strengths=parse_strengths(strengths) if strengths else (),
        context_tokens=context_tokens,
        clip_skip=clip_skip,
        prompt_weights=prompt_weights,
        style=parse_style(lora, embedding),
        one_step=one_step,
        with_teacher=with_teacher,
        marks=marks,
        safety=safety,
        signing_key=sign,
    )
    # Before a checkpoint in one file is converted, which takes minutes, or TAESD is fetched.
    check_options(options, decoder=decoder, encoder=encoder)
    model = unpacked(model, config, vae)
    options = replace(
        options,
        model=model,
        decoder=resolve_decoder(decoder, model),
        encoder=resolve_encoder(encoder, model),
        controlnet=resolve_controlnet(control, model) if control is not None else None,
    )
    check_request(options)
    if choice is not None:
        from hipa_deploy.fit.export_plan import need_lines, plan_export

        planned = need_lines(plan_export(options, choice.target))
        _say(choice.lines())
        _say(planned or ["note: weights of this kind are planned once the bundle is written"])
    if build:
        from hipa_deploy.engines.build.build_bundle import check_tools

        # Before minutes of export: a missing compiler is reported at once.
        check_tools(build.value)

    from hipa_deploy.export.export_bundle import export_checked

    _collect_less()
    bundle = export_checked(options, console)

    # One line a stage: how close it is to PyTorch, and what FP16 could not hold.
    for stage in bundle.all_stages.values():
        line = f"{stage.spec.name}: {_parity_text(stage.parity)}"
        if stage.fp32_islands:
            line += f"; in FP32: {', '.join(stage.fp32_islands)}"
        console.print(line, highlight=False)

    if build:
        from hipa_deploy.engines.targets.build_options import BuildOptions

        build_engines(out, build, "auto", BuildOptions())
    if choice is not None:
        from hipa_deploy.fit.export_plan import bundle_needs

        needs = bundle_needs(bundle, choice.target)
        _say(need_lines(needs))
        # The figures of the bundle's own files can be larger than what was predicted before.
        if any(need.verdict == "does not fit" for need in needs):
            _say([f"warning: the bundle is written, and may not fit {choice.title}."])
        _say([f"next: hipa-build {shlex.quote(str(out))} --for {choice.target} --dry-run"])
    typer.echo(out)


def _only_controlnet(given: list[str] | None) -> str | None:
    """The value of ``--controlnet``; None where it is not given.

    Of other options the last one counts. Several ControlNets at once are a known use, of which
    one would be lost.

    Raises:
        HipaError: it is given more than once.

    """
    if not given:
        return None
    if len(given) > 1:
        times = "twice" if len(given) == 2 else f"{len(given)} times"
        raise HipaError(
            f"--controlnet is given {times}: {', '.join(given)}. A bundle holds one ControlNet "
            "only. Leave out the others, or export a bundle with each."
        )
    return given[0]


def _choose_for(
    target: str, context: typer.Context, layout: Layout, build: EngineBackend | None
) -> TargetChoice:
    """What suits the target, where the other options leave a choice.

    Raises:
        HipaError: there is no such target, or another option contradicts it.

    """
    from hipa_deploy.fit.target_choice import export_choice

    given = given_options(context, ("--dtype", "--decoder", "--batch"))
    choice = export_choice(target, given)
    if build is not None:
        raise HipaError(
            f"--build compiles for this machine, and --for {target} chooses for {choice.title}. "
            f"Leave out --build, and run hipa-build with --for {target} on the bundle."
        )
    if layout is Layout.generic and choice.values.get("--decoder", "full") != "full":
        raise HipaError(
            f"--for {target} takes --decoder {choice.values['--decoder']}, which needs --layout "
            "onestep. Leave out --layout generic, or give --decoder full."
        )
    return choice


def _say(lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _export_swap(
    model: str,
    config: str | None,
    vae: str | None,
    adaptor: str | None,
    scale: float,
    one_step: str | None,
    style: Style,
    decoder: str,
    controlnet: str | None,
    bundle: Path,
    out: Path,
    signing_key: Path | None,
) -> None:
    """Write to ``out`` the weights of adaptor and LoRAs that differ from those of ``bundle``."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.export.export_request import SwapOptions, check_swap_request
    from hipa_deploy.models.locate import resolve_controlnet, resolve_decoder, unpacked
    from hipa_deploy.models.lora.early_lora import check_before_model

    if adaptor is None and not style.loras:
        raise HipaError(
            "--swap-for needs --adaptor or --lora: whose weights to write for the bundle."
        )

    # What is missing is named before an output that is there, and both before a checkpoint is
    # converted, which takes minutes.
    root = resolve_bundle(bundle)
    Bundle.open(root)
    folder = chosen_adaptor(adaptor)
    check_before_model(model, style, folder)
    refuse_to_overwrite(out)
    model = unpacked(model, config, vae)
    # The decoder is asked for because a fused bundle has it in the same graph as the adaptor.
    options = SwapOptions(
        model=model,
        adaptor=folder,
        adaptor_scale=scale,
        style=style,
        bundle=root,
        out=out,
        decoder=resolve_decoder(decoder, model),
        one_step=one_step,
        controlnet=resolve_controlnet(controlnet, model) if controlnet is not None else None,
        signing_key=signing_key,
    )
    check_swap_request(options)

    from hipa_deploy.export.export_swap import export_swap

    _collect_less()
    swap = export_swap(options, console)
    manifest = swap.manifest
    line = f"{manifest.stage}: {len(manifest.weights)} weights differ; "
    console.print(line + _parity_text(manifest.parity), highlight=False)
    for stage, text in manifest.texts.items():
        line = f"{stage}: {len(text.weights)} weights differ; "
        console.print(line + _parity_text(text.parity), highlight=False)
    typer.echo(out)


def _collect_less() -> None:
    """Leave the imported libraries out of every later collection of garbage.

    An export collects a thousand times, and each large collection would walk through all objects of
    torch and diffusers, which live until the end: a fifth of the time of a small model's export.
    """
    gc.freeze()


def _parity_text(parity: Parity) -> str:
    """How close an exported stage is to PyTorch, in words."""
    return f"{parity.psnr_db:.1f} dB from PyTorch FP32 (ONNX Runtime, CPU)"
