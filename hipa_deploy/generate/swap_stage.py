"""Exchange the adaptor of a loaded stage, on every backend that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from hipa_deploy.bundle.adaptor_swap import (
    TEXT_STAGE,
    TEXT_WEIGHTS,
    WEIGHTS,
    AdaptorSwap,
    adapted_stage,
)
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Precision
from hipa_deploy.bundle.parity import problem
from hipa_deploy.bundle.reference import Reference
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache
from hipa_deploy.engines.store.select import rebuild_command
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.tensorrt.library import as_tensorrt_library
from hipa_deploy.engines.tensorrt.refit import (
    RefitFailedError,
    check_refittable,
    refit_engine,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner
from hipa_deploy.generate.stages import output_names, stage_feed


class EngineRunner(Runner, Protocol):
    """A runner of one stage on an engine of TensorRT or TensorRT-RTX."""

    def change_engine(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Call ``change(trt, engine)``, which may alter the engine, while nothing runs on it."""

    def look_at_engine(self, look: Callable[[ModuleType, Any], None]) -> None:
        """Call ``look(trt, engine)``, which alters nothing: captured graphs stay."""


def swap_stage(
    bundle: Bundle, runner: Runner | None, backend: str, swap: AdaptorSwap | None
) -> Runner:
    """The runner of the stage that has the UNet, with the weights of ``swap``.

    An engine changes in place and is then checked: its output for the bundle's reference inputs
    must agree with PyTorch's. It is closed if it does not. ONNX Runtime gets a new session, and the
    old one stays open: it is the caller's to close, once no call runs on it.

    Args:
        bundle: the bundle that ``runner`` was opened from.
        runner: the loaded stage; None where no session is open yet.
        backend: the runner's backend.
        swap: the adaptor; None: the bundle's own weights.

    Returns:
        The runner to use from now on: on TensorRT the same, on ONNX Runtime a new one.

    Raises:
        HipaError: weights that are not of the bundle's graph, a backend that cannot swap, an engine
            that cannot be refitted, a TensorRT with a known fault, or an output that does not agree
            with PyTorch's.

    """
    _check_backend(backend)
    bundle.check_unchanged(adapted_stage(bundle))
    weights = swap.weights(bundle) if swap else {}
    if backend.startswith("onnxruntime"):
        return _swap_session(bundle, backend, swap, weights, adapted_stage(bundle))
    assert runner is not None, "an engine changes in place"
    return _swap_engine(bundle, runner, backend, swap, weights)


def check_swaps(bundle: Bundle, runner: Runner | None, backend: str) -> None:
    """Check that the stage that has the UNet can take another adaptor; nothing changes.

    Args:
        bundle: the bundle that ``runner`` was opened from.
        runner: the loaded stage; None where none is loaded: then its engine is not looked at.
        backend: the runner's backend.

    Raises:
        HipaError: the backend cannot, or the engine was not built for it.

    """
    _check_backend(backend)
    if runner is None or backend.startswith("onnxruntime"):
        return
    library = as_tensorrt_library(backend)
    remedy = rebuild_command(bundle.root, library, BuildOptions(refit=True))

    def look(trt: ModuleType, engine: Any) -> None:
        check_refittable(trt, engine, adapted_stage(bundle), library, remedy)

    cast(EngineRunner, runner).look_at_engine(look)


def _check_backend(backend: str) -> None:
    if backend.startswith("openvino"):
        raise HipaError(f"backend {backend} does not swap adaptors. Use --backend onnxruntime.")


def swap_text_encoder(
    bundle: Bundle, backend: str, swap: AdaptorSwap | None, stage: str = TEXT_STAGE
) -> Runner:
    """A new session of a text encoder, with the weights that ``swap`` has for it.

    Raises:
        HipaError: weights that are not of the bundle's graph, or another backend than ONNX Runtime:
            engines of text encoders are built without refitting.

    """
    if not backend.startswith("onnxruntime"):
        raise HipaError(
            f"this swap changes the text encoder too, which backend {backend} cannot take. "
            "Use --backend onnxruntime, or export a bundle with these LoRAs."
        )
    bundle.check_unchanged(stage)
    weights = swap.text_weights(bundle, stage) if swap else {}
    return _swap_session(bundle, backend, swap, weights, stage)


def _swap_session(
    bundle: Bundle,
    backend: str,
    swap: AdaptorSwap | None,
    weights: Mapping[str, np.ndarray],
    stage: str,
) -> Runner:
    """A new session of ONNX Runtime: an existing one has folded its weights already."""
    return OnnxRuntimeRunner(
        bundle.stage_path(stage),
        bundle.stages[stage].spec,
        backend,
        cache=_engine_cache(bundle, stage, backend, swap),
        weights=weights,
    )


def _swap_engine(
    bundle: Bundle,
    runner: Runner,
    backend: str,
    swap: AdaptorSwap | None,
    weights: Mapping[str, np.ndarray],
) -> Runner:
    """Refit the engine in place and check it.

    An engine whose weights have changed is closed unless it is right: its images would name the
    adaptor that it had before.
    """
    path = bundle.stage_path(adapted_stage(bundle))
    library = as_tensorrt_library(backend)
    remedy = rebuild_command(bundle.root, library, BuildOptions(refit=True))

    def change(trt: ModuleType, engine: Any) -> None:
        refit_engine(trt, engine, path, weights, library, remedy)

    # What can be wrong with the files is found before the engine changes.
    feed, expected = _expected_output(bundle, runner, swap)
    try:
        cast(EngineRunner, runner).change_engine(change)
    except RefitFailedError:
        runner.close()
        raise
    try:
        _check_output(runner, feed, expected, bundle.manifest.precision)
    except BaseException:
        runner.close()
        raise
    return runner


def _engine_cache(
    bundle: Bundle, stage: str, backend: str, swap: AdaptorSwap | None
) -> Path | None:
    """Where a TensorRT provider of ONNX Runtime keeps what it made of these weights.

    A provider does not look at the weights itself, so an adaptor has a folder of its own.
    """
    cache = engine_cache(bundle, stage, backend)
    if cache is None:
        return None
    file = TEXT_WEIGHTS.get(stage, WEIGHTS)
    if swap is None or file not in swap.manifest.files:
        return cache
    return cache.with_name(f"{cache.name}-{swap.manifest.files[file][:12]}")


def _expected_output(
    bundle: Bundle, runner: Runner, swap: AdaptorSwap | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The bundle's reference inputs of the stage, and what PyTorch gives for them.

    Raises:
        HipaError: a file that is damaged.

    """
    spec = runner.spec
    layout = bundle.manifest.layout
    tensors = Reference.read(bundle).tensors
    (output_name,) = output_names(spec, layout)
    expected = swap.reference() if swap else tensors[output_name]

    # A graph may take float16 where the reference is float32.
    inputs = stage_feed(spec, tensors, layout)
    feed = {tensor.name: inputs[tensor.name].astype(tensor.dtype) for tensor in spec.inputs}
    return feed, expected


def _check_output(
    runner: Runner, feed: Mapping[str, np.ndarray], expected: np.ndarray, precision: Precision
) -> None:
    """Compare the stage's output with PyTorch's.

    Raises:
        RefitFailedError: they do not agree.

    """
    spec = runner.spec
    output = runner(**feed)[spec.outputs[0].name]
    wrong = problem(output, expected, precision)
    if wrong:
        raise RefitFailedError(
            f"{spec.name} after the swap {wrong}. Load the bundle again, and report this."
        )
