"""``hipa-build``: compile a bundle's stages into engines."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    BundleArgument,
    EngineBackend,
    ForOption,
    console,
    given_options,
)
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.engines.build.build_stage import BuiltEngine
    from hipa_deploy.engines.build.memory_plan import MemoryPlan
    from hipa_deploy.engines.targets.build_options import BuildOptions
    from hipa_deploy.fit.target_choice import TargetChoice

MAX_SWAP_GIB = 1024
# What --for can decide; the other options have nothing to do with a device.
_CHOSEN = (
    "--backend",
    "--target",
    "--workspace",
    "--tactic-dram",
    "--optimization-level",
    "--swap",
)


def build(
    context: typer.Context,
    bundle: BundleArgument,
    backend: Annotated[
        EngineBackend | None,
        typer.Option(
            help="rtx: TensorRT-RTX, compiles on any machine for a GeForce or RTX GPU. "
            "tensorrt: compiles on the device that will run the engines. Required without --for."
        ),
    ] = None,
    for_target: ForOption = None,
    target: Annotated[
        str,
        typer.Option(
            help="Device to build for: auto (this machine), or a name such as rtx30, rtx40, "
            "rtx50, orin-nano. A wrong name prints the list."
        ),
    ] = "auto",
    workspace: Annotated[
        int | None,
        typer.Option(
            help="Scratch memory that one layer may use on the GPU, in MiB; "
            "by default what suits the target."
        ),
    ] = None,
    tactic_dram: Annotated[
        int | None,
        typer.Option(
            help="Jetson only: memory that the builder may use while it tries out kernels, in MiB; "
            "by default what suits the target."
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(help="0 builds fastest, 5 may run fastest; by default what suits the target."),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps kernel timings, so that the next build is faster; "
            "by default one in the cache folder for each device and version."
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Build engines whose weights can be replaced later, as hipa-generate --adaptor "
            "does; they may be slower.",
        ),
    ] = False,
    best_of: Annotated[
        int,
        typer.Option(
            help="Build this many times and keep the engine that runs fastest on this GPU."
        ),
    ] = 1,
    no_repair: Annotated[
        bool,
        typer.Option(
            "--no-repair",
            help="Build as TensorRT alone does, and reject an engine that fails its check at once. "
            "By default known faults of this TensorRT have their remedies, and an engine that "
            "fails is built again with repairs until it passes.",
        ),
    ] = False,
    without_remedy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT",
            help="Leave out the remedy of a known fault, by the name that a build prints; may be "
            "given several times. It is tried all the same if the engine fails its check.",
        ),
    ] = None,
    swap: Annotated[
        int | None,
        typer.Option(
            help="Swap space in GiB that the prediction counts with, such as a file that you will "
            "add; by default what is free here, and none on another device.",
            min=0,
            max=MAX_SWAP_GIB,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the predicted memory and build nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build even if the prediction says it will not fit.")
    ] = False,
) -> None:
    """Compile a bundle's models into TensorRT engines for one kind of GPU.

    The engines are written into the bundle. If this machine can run them, each is checked on the
    bundle's reference before it counts as built. Engines that are already up to date are kept.
    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.engines.faults.known_faults import find_fault
    from hipa_deploy.engines.targets.build_options import BuildOptions

    # A bundle that is not there is named even where the backend is missing too.
    root = resolve_bundle(bundle)
    Bundle.open(root)
    retold = None
    if for_target is not None:
        given = given_options(context, _CHOSEN)
        choice = _choose_for(for_target, given)
        for line in choice.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        backend = EngineBackend(choice.values["--backend"])
        target = choice.target
        swap = choice.values.get("--swap", swap)
        retold = ["--for", for_target]
        if "--backend" in choice.overridden:
            retold += ["--backend", backend.value]
    if backend is None:
        raise HipaError(
            "--backend is missing. Expected rtx or tensorrt; or --for TARGET, which chooses it."
        )

    # An option that was not given keeps the default of BuildOptions, or of the target.
    options_by_name = {
        "workspace_mib": workspace,
        "tactic_dram_mib": tactic_dram,
        "optimization_level": optimization_level,
        "timing_cache": timing_cache,
        "refit": refit or None,
    }
    options = BuildOptions.model_validate(
        {name: value for name, value in options_by_name.items() if value is not None}
    )

    without_remedies = tuple(without_remedy or ())
    for name in without_remedies:
        find_fault(name)
    if no_repair and without_remedies:
        raise HipaError("--no-repair leaves out every remedy. Omit --without-remedy.")

    if dry_run:
        _dry_run(root, backend, target, options, swap)
        return
    retold = retold or ["--backend", backend.value, "--target", target]
    _refuse_elsewhere(bundle, backend, target, options, swap, retold)
    build_engines(
        root,
        backend,
        target,
        options,
        best_of=best_of,
        force=force,
        repair=not no_repair,
        without_remedies=without_remedies,
        swap_gib=swap,
    )


def _choose_for(target: str, given: dict[str, Any]) -> TargetChoice:
    """What suits the target, and what of the user's wins.

    Raises:
        HipaError: there is no such target, or an option contradicts it.

    """
    from hipa_deploy.fit.target_choice import build_choice, check_build

    # A mistake first: to look at this machine takes as long as to import TensorRT.
    check_build(target, given)
    from hipa_deploy.engines.build.build_bundle import built_elsewhere

    return build_choice(target, given, here=built_elsewhere("tensorrt", target) is None)


def _refuse_elsewhere(
    bundle: str,
    backend: EngineBackend,
    target: str,
    options: BuildOptions,
    swap: int | None,
    retold: list[str],
) -> None:
    """Print the memory plan of a device that this machine cannot build for.

    ``retold`` is how the command to run there names the device.

    Raises:
        HipaError: it is such a device; the message has the command to run there, and what does not
            fit.

    """
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.engines.build.build_bundle import built_elsewhere

    title = built_elsewhere(backend.value, target)
    if title is None:
        return
    root = resolve_bundle(bundle)
    plan = _print_plan(root, backend, target, options, swap)

    # The included bundle is there already.
    included = not Path(bundle).is_dir()
    name = bundle if included else root.name
    flags = [*retold, *options.flags()]
    command = shlex.join(["hipa-build", name, *flags])
    there = "Run there" if included else f"Copy {root} there and run"
    try:
        plan.refuse_misfits()
        doubt = ""
    except HipaError as error:
        doubt = f" It may not fit: {error}"
    raise HipaError(
        f"engines for {title} are built on the device itself, and this is the plan. "
        f"{there}: {command}.{doubt}"
    )


def _dry_run(
    root: Path, backend: EngineBackend, target: str, options: BuildOptions, swap: int | None
) -> None:
    """Print the memory plan.

    Raises:
        HipaError: a stage does not fit the target.

    """
    # After the tables: the user sees the numbers as well as the refusal.
    _print_plan(root, backend, target, options, swap).refuse_misfits()


def _print_plan(
    root: Path, backend: EngineBackend, target: str, options: BuildOptions, swap: int | None
) -> MemoryPlan:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.engines.build.build_bundle import dry_run
    from hipa_deploy.engines.build.memory_plan import render_memory_plan

    bundle = Bundle.open(root)
    plan = dry_run(bundle, backend=backend.value, target=target, options=options, swap_gib=swap)
    Console().print(*render_memory_plan(plan), sep="\n")
    return plan


def build_engines(
    root: Path, backend: EngineBackend, target: str, options: BuildOptions, **more: Any
) -> None:
    """Build the engines of the bundle at ``root``, print their paths, check those that run here.

    Args:
        root: a bundle's folder.
        backend: what compiles the engines.
        target: 'auto', or a target's name.
        options: build options that are not the target's own.
        more: ``best_of``, ``force``, ``repair``, ``without_remedies`` and ``swap_gib``, as
            ``build_bundle`` takes them.

    Raises:
        HipaError: the bundle, the backend or the target does not allow it, or an engine built for
            this machine gives other images than the export did.

    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.engines.build.build_bundle import build_bundle

    bundle = Bundle.open(root)
    built = build_bundle(
        bundle, backend=backend.value, target=target, options=options, console=console, **more
    )
    for engine in built:
        typer.echo(engine.path)
        _tell(engine)
    _check_engines(bundle, backend.value, built)


def _tell(engine: BuiltEngine) -> None:
    """Say what was done to an engine that is not as the options alone make it."""
    sidecar = engine.sidecar
    if sidecar.key.repairs is not None:
        console.print(f"{engine.stage}: built with {sidecar.key.repairs}", highlight=False)
    for remedy in sidecar.remedies:
        console.print(f"{engine.stage}: known fault {remedy}", highlight=False)
    if sidecar.attention is not None:
        console.print(f"{engine.stage}: attention: {sidecar.attention}", highlight=False)


def _check_engines(bundle: Bundle, backend: str, built: list[BuiltEngine]) -> None:
    """Run the new engines on the bundle's reference prompt, if they are for this machine."""
    from hipa_deploy.doctor.self_check import check_bundle
    from hipa_deploy.engines.store.select import engines_here
    from hipa_deploy.engines.tensorrt.library import as_tensorrt_library

    # An engine for another device can be built here but not run here; there may be others that run.
    paths = {engine.stage: engine.path.resolve() for engine in built}
    loaded = engines_here(bundle, as_tensorrt_library(backend))
    are_here = [path.resolve() == paths.get(stage) for stage, path in loaded.items()]
    if not are_here or not all(are_here):
        console.print("These engines are for another machine. Check them there: hipa-doctor BUNDLE")
        return

    try:
        checked = check_bundle(bundle, backend)
    except HipaError as error:
        raise HipaError(
            f"the engines are built and kept, and they do not run here now: {error}"
        ) from None
    for name, check in checked.stages.items():
        console.print(f"{name}: {check}", highlight=False)
    if checked.problems:
        raise HipaError(
            f"{' '.join(checked.problems)} The engines are kept. "
            "Run hipa-doctor --self-test for a report."
        )
