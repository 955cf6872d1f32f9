"""Load a bundle's stages on a backend. This is the one place that knows every backend.

Each backend's module is imported only where that backend is chosen: none of them needs the others
to be installed.
"""

from __future__ import annotations

from contextlib import ExitStack

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import ENGINE_BACKENDS, Runner
from hipa_deploy.generate.stages import Stages, host_stages, input_names, output_names
from hipa_deploy.tasks import unet_inputs


def resolve_backend(backend: str, bundle: Bundle) -> str:
    """The backend that 'auto' stands for; any other name as it is.

    'auto' is TensorRT or TensorRT-RTX where engines are built for this device, else ONNX Runtime on
    the CPU.
    """
    if backend != "auto":
        return backend
    from hipa_deploy.engines.store.select import backend_with_engines

    return backend_with_engines(bundle) or "onnxruntime"


def open_runner(bundle: Bundle, stage: str, backend: str) -> Runner:
    """Load one stage on one backend (not 'auto').

    Raises:
        HipaError: the backend is not installed, or no engine fits this device; the message says
            what to run.

    Example:
        >>> with open_runner(bundle, "unet", "onnxruntime") as unet:
        ...     latents_BCHW = unet(noise=noise_BCHW, context=context_BLD)["latents"]

    """
    path = bundle.stage_path(stage)
    spec = bundle.all_stages[stage].spec
    if backend.startswith("openvino"):
        from hipa_deploy.engines.backends.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(path, spec, backend)
    if backend.startswith("onnxruntime"):
        from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache

        cache = engine_cache(bundle, stage, backend)
        return OnnxRuntimeRunner(path, spec, backend, cache=cache)
    from hipa_deploy.engines.store.select import open_engine

    return open_engine(bundle, stage, backend)


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


def open_stages(bundle: Bundle, backend: str) -> Stages:
    """Load every stage on one backend (not 'auto').

    TensorRT runs the stages of the onestep layout as one CUDA graph. The generic layout has
    arithmetic of ours between its stages, so there the host hands tensors over on every backend.

    Raises:
        HipaError: as ``open_runner`` and ``check_stages`` do. Stages that were loaded are released.

    """
    check_stages(bundle)
    if backend in ENGINE_BACKENDS and bundle.manifest.layout == "onestep":
        from hipa_deploy.engines.store.select import open_engines

        return open_engines(bundle, bundle.stages, backend)

    # If a stage cannot be loaded, the stack closes those before it.
    with ExitStack() as opened:
        runners = {}
        for stage in bundle.stages:
            runners[stage] = opened.enter_context(open_runner(bundle, stage, backend))
        opened.pop_all()  # all are loaded, so the stages own them now
    return host_stages(bundle, backend, runners)
