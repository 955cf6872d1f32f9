"""``hipa-build``: compile a bundle's stages into engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    BundleArgument,
    EngineBackend,
    console,
)
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.engines.targets.build_options import BuildOptions


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
    from hipa_deploy.engines.targets.build_options import BuildOptions

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
        build_engines(root, backend, target, options, best_of=best_of, force=force)


def _dry_run(root: Path, backend: EngineBackend, target: str, options: BuildOptions) -> None:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.engines.build.build_bundle import dry_run
    from hipa_deploy.engines.build.memory_plan import render_plan

    plan = dry_run(Bundle.open(root), backend=backend.value, target=target, options=options)
    Console().print(*render_plan(plan), sep="\n")
    plan.refuse_misfits()


def build_engines(
    root: Path, backend: EngineBackend, target: str, options: BuildOptions, **more: Any
) -> None:
    """Build the engines of the bundle at ``root``, print their paths, and check those that run here."""
    from hipa_deploy.bundle.folder import Bundle
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
    from hipa_deploy.engines.store.select import backend_with_engines

    if backend_with_engines(bundle) != backend:
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
