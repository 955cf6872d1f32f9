"""Load a bundle's stages on a backend. This is the one place that knows every backend.

Each backend's module is imported only where that backend is chosen: none of them needs the others
to be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import CPU_BACKENDS, ENGINE_BACKENDS, Runner
from hipa_deploy.generate.stages import Stages, host_stages, input_names, output_names
from hipa_deploy.tasks import unet_inputs

if TYPE_CHECKING:
    from hipa_deploy.engines.backends.compiled_cache import CompiledStage

Kept = Literal["none", "use", "renew"]


def resolve_backend(backend: str, bundle: Bundle) -> str:
    """The backend that 'auto' stands for; any other name as it is.

    'auto' is TensorRT or TensorRT-RTX where engines are built for this device, else ONNX Runtime on
    the CPU.
    """
    if backend != "auto":
        return backend
    from hipa_deploy.engines.store.select import backend_with_engines

    return backend_with_engines(bundle) or "onnxruntime"


def open_runner(bundle: Bundle, stage: str, backend: str, *, kept: Kept = "none") -> Runner:
    """Load one stage on one backend (not 'auto').

    Args:
        bundle: of the stage. Its hashes have been checked.
        stage: its name.
        backend: what runs it.
        kept: whether a CPU backend takes the compiled stage that an earlier start left in this
            user's cache, and leaves one there: 'none', 'use', or 'renew', which makes it again.

    Raises:
        HipaError: the backend is not installed, or no engine fits this device; the message says
            what to run.

    Example:
        >>> with open_runner(bundle, "unet", "onnxruntime") as unet:
        ...     latents_BCHW = unet(noise=noise_BCHW, context=context_BLD)["latents"]

    """
    path = bundle.stage_path(stage)
    spec = bundle.stages[stage].spec
    if backend in CPU_BACKENDS:
        return _open_on_cpu(bundle, stage, backend, kept)
    if backend.startswith("onnxruntime"):
        from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache

        cache = engine_cache(bundle, stage, backend)
        return OnnxRuntimeRunner(path, spec, backend, cache=cache)
    from hipa_deploy.engines.store.select import open_engine

    return open_engine(bundle, stage, backend)


def _open_on_cpu(bundle: Bundle, stage: str, backend: str, kept: Kept) -> Runner:
    """Load one stage on ONNX Runtime or OpenVINO, compiled now or at an earlier start."""
    path = bundle.stage_path(stage)
    spec = bundle.stages[stage].spec
    compiled = _compiled(bundle, stage, backend, kept)
    if backend.startswith("openvino"):
        from hipa_deploy.engines.backends.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(path, spec, backend, compiled=compiled)
    from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner

    return OnnxRuntimeRunner(path, spec, backend, compiled=compiled)


def _compiled(bundle: Bundle, stage: str, backend: str, kept: Kept) -> CompiledStage | None:
    """Where the compiled form of a stage lies, for a CPU backend; None where it is not kept."""
    if kept == "none":
        return None
    from hipa_deploy.engines.backends.compiled_cache import compiled_stage

    options: Callable[[], dict[str, Any]]
    if backend.startswith("openvino"):
        from hipa_deploy.engines.backends import openvino_runner

        options = openvino_runner.compiled_options
    else:
        from hipa_deploy.engines.backends import onnxruntime_runner

        options = onnxruntime_runner.compiled_options
    return compiled_stage(bundle, stage, backend, options, again=kept == "renew")


def check_stages(bundle: Bundle) -> None:
    """Check that the stages of a manifest lead from what the pipeline gives them to images.

    Raises:
        HipaError: a stage is missing, stands in the wrong place, or takes or gives something else.

    """
    manifest = bundle.manifest
    known = {"tokens" if "text_encoder" in bundle.stages else "context"}
    known |= set(unet_inputs(manifest.task, len(manifest.strengths))) - {"source", "context"}
    if manifest.task != "generate":
        known.add("image")
    generic = manifest.layout == "generic"
    if generic:
        known.add("timestep")

    images = None
    for stage in manifest.stages:
        for name in input_names(stage.spec, manifest.layout):
            if name not in known:
                raise _unfit(bundle, f"stage {stage.spec.name} takes {shown(name)}")
        if len(stage.spec.outputs) != 1:
            raise _unfit(bundle, f"stage {stage.spec.name} has several outputs")
        known |= set(output_names(stage.spec, manifest.layout))
        images = stage.spec.outputs[0]
        # Numpy does what the generic layout leaves out.
        if generic and stage.spec.name == "unet":
            known.add("latents")

    expected = "sample" if generic else "images"
    if images is None or images.name != expected or len(images.shape) != 4:
        raise _unfit(bundle, f"the last stage does not give {expected}")
    if not generic and (images.dtype != "uint8" or images.shape[3] != 3):
        raise _unfit(bundle, "the last stage gives no RGB images")


def _unfit(bundle: Bundle, problem: str) -> HipaError:
    layout = bundle.manifest.layout
    return HipaError(
        f"{bundle.root}: {problem}, which does not fit layout {layout} and task "
        f"{bundle.manifest.task}. Export the bundle again."
    )


def open_stages(bundle: Bundle, backend: str, *, kept: Kept = "none") -> Stages:
    """Load every stage on one backend (not 'auto'), with ``kept`` as ``open_runner`` takes it.

    TensorRT runs the stages of the onestep layout as one CUDA graph. The generic layout has
    arithmetic of ours between its stages, so there the host hands tensors over on every backend.

    Raises:
        HipaError: as ``open_runner`` and ``check_stages`` do. Stages that were loaded are released.

    """
    check_stages(bundle)
    if backend in ENGINE_BACKENDS and bundle.manifest.layout == "onestep":
        from hipa_deploy.engines.store.select import open_engines

        return open_engines(bundle, bundle.path_stages, backend)

    if kept == "use" and _all_kept(bundle, backend):
        runners = _open_side_by_side(bundle, backend)
    else:
        runners = _open_in_turn(bundle, backend, kept)
    return host_stages(bundle, backend, runners)


def _open_in_turn(bundle: Bundle, backend: str, kept: Kept) -> dict[str, Runner]:
    """One stage after the other: compiling takes memory that the next compilation uses again."""
    # If a stage cannot be loaded, the stack closes those before it.
    with ExitStack() as opened:
        runners = {}
        for stage in bundle.path_stages:
            runners[stage] = opened.enter_context(open_runner(bundle, stage, backend, kept=kept))
        opened.pop_all()  # all are loaded, so the stages own them now
    return runners


def _all_kept(bundle: Bundle, backend: str) -> bool:
    """Whether every stage is small, or lies compiled in this user's cache."""
    if backend not in CPU_BACKENDS:
        return False
    compiled = [_compiled(bundle, stage, backend, "use") for stage in bundle.path_stages]
    return all(stage is None or stage.found() for stage in compiled)


def _open_side_by_side(bundle: Bundle, backend: str) -> dict[str, Runner]:
    """Compiled stages all at once: each holds its own weights at the end, and no more meanwhile."""
    with ThreadPoolExecutor(len(bundle.path_stages)) as pool:
        futures = {}
        for stage in bundle.path_stages:
            futures[stage] = pool.submit(open_runner, bundle, stage, backend, kept="use")
    # If a stage cannot be loaded, the stack closes the others.
    with ExitStack() as opened:
        for future in futures.values():
            if future.exception() is None:
                opened.enter_context(future.result())
        runners = {stage: future.result() for stage, future in futures.items()}
        opened.pop_all()
    return runners
