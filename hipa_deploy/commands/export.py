"""``hipa-export``: a base model and an adaptor become a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.commands.build import build_engines
from hipa_deploy.commands.options import (
    ConfigOption,
    EngineBackend,
    Layout,
    ModelOption,
    Precision,
    Task,
    console,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import require

if TYPE_CHECKING:
    pass


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
    from hipa_deploy.export.export_bundle import export_bundle
    from hipa_deploy.export.export_options import ExportOptions
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
        from hipa_deploy.engines.targets.build_options import BuildOptions

        build_engines(out, build, "auto", BuildOptions())
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
