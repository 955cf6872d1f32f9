"""Another adaptor in a loaded stage, on every backend that can swap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from hipa_deploy.bundle.adaptor_swap import WEIGHTS, AdaptorSwap, adapted_stage
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.parity import problem
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache
from hipa_deploy.engines.store.select import rebuild_command
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.library import as_tensorrt_library
from hipa_deploy.engines.tensorrt.refit import RefitFailedError, refit_engine
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner

_GENERIC_INPUTS = (
    "noise",
    "timestep",
    "context",
)  # the reference tensors; a onestep stage's inputs are named so


class EngineRunner(Runner, Protocol):
    """A stage on an engine of TensorRT."""

    def change_engine(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Let ``change`` alter the engine, given TensorRT and the engine, while nothing runs on it."""


def swap_stage(bundle: Bundle, runner: Runner, backend: str, swap: AdaptorSwap | None) -> Runner:
    """The runner of the stage that holds the UNet with the weights of ``swap``; None: with the bundle's own.

    An engine changes in place, is checked against PyTorch's output for the bundle's reference inputs, and is closed
    if it fails. ONNX Runtime gets a new session, and the old one is closed.

    Raises:
        HipaError: weights that are not of the bundle's graph, an engine that cannot be refitted, a TensorRT with a
            known fault, or an output that does not agree with PyTorch.

    """
    stage, weights = adapted_stage(bundle), swap.weights(bundle) if swap else {}
    path = bundle.stage_path(stage)
    if backend.startswith("onnxruntime"):
        spec, kept = bundle.stages[stage].spec, _engine_cache(bundle, stage, backend, swap)
        fresh = OnnxRuntimeRunner(path, spec, backend, cache=kept, weights=weights)
        runner.close()
        return fresh
    if backend.startswith("openvino"):
        raise HipaError(f"backend {backend} does not swap adaptors. Use --backend onnxruntime.")
    library = as_tensorrt_library(backend)
    remedy = rebuild_command(bundle.root, library, BuildOptions(refit=True))

    def change(trt: ModuleType, engine: Any) -> None:
        refit_engine(trt, engine, path, weights, library, remedy)

    try:
        cast(EngineRunner, runner).change_engine(change)
        _check_output(bundle, runner, swap)
    except RefitFailedError:
        runner.close()
        raise
    return runner


def _engine_cache(
    bundle: Bundle, stage: str, backend: str, swap: AdaptorSwap | None
) -> Path | None:
    """Where the TensorRT provider keeps engines with these weights: it does not look at them itself."""
    if backend != "onnxruntime-tensorrt":
        return None
    own = engine_cache(bundle, stage)
    return own.with_name(f"{own.name}-{swap.manifest.files[WEIGHTS][:12]}") if swap else own


def _check_output(bundle: Bundle, runner: Runner, swap: AdaptorSwap | None) -> None:
    """Raise RefitFailedError unless the stage gives what PyTorch gives with this adaptor."""
    spec, output = runner.spec, _reference_output(bundle)
    with np.load(bundle.path("reference/tensors.npz")) as tensors:
        named = (
            _GENERIC_INPUTS
            if bundle.manifest.layout == "generic"
            else [tensor.name for tensor in spec.inputs]
        )
        inputs = [tensors[name] for name in named]
        expected = swap.reference() if swap else tensors[output]
    feed = {
        tensor.name: value.astype(tensor.dtype)
        for tensor, value in zip(spec.inputs, inputs, strict=True)
    }
    wrong = problem(runner(**feed)[spec.outputs[0].name], expected, bundle.manifest.precision)
    if wrong:
        raise RefitFailedError(
            f"{spec.name} after the swap {wrong}. Load the bundle again, and report this."
        )


def _reference_output(bundle: Bundle) -> str:
    """The reference tensor that the stage with the UNet gives."""
    if bundle.manifest.layout == "generic":
        return "output"
    return "images" if "generator" in bundle.stages else "latents"
