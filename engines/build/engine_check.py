"""The gate of an engine: it runs on the bundle's reference tensors before it counts as built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import TEACHER_STAGE, Parity, Precision, StageSpec
from hipa_deploy.bundle.parity import MIN_PSNR_DB, compare, problem
from hipa_deploy.bundle.reference import (
    REFERENCE_TENSORS,
    TEACHER_TENSORS,
    Reference,
    teacher_tensors,
)
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.sidecar import EngineCheck
from hipa_deploy.engines.tensorrt.cuda import check_driver, load_cudart
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.stages import name_along_path

# CUDA says 'out of memory (error 2)'; TensorRT 'Error Code 2: OutOfMemory (no further information)'
# and 'Cuda Runtime (out of memory)' (https://github.com/NVIDIA/TensorRT/issues/3017).
_NO_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)


@dataclass(frozen=True)
class StageReference:
    """What a stage is fed, and what PyTorch in float32 made of it.

    Attributes:
        feed: the inputs by the names of the stage's file, in its types.
        expected: the outputs by those names, as the reference has them.

    """

    feed: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def stage_reference(bundle: Bundle, stage: str) -> StageReference:
    """The reference tensors of one stage.

    A stage is fed PyTorch's own tensors here, so that only its own error shows.

    Raises:
        HipaError: the bundle has no reference, or one that lacks a tensor of this stage.

    """
    is_teacher = stage == TEACHER_STAGE
    if (TEACHER_TENSORS if is_teacher else REFERENCE_TENSORS) not in bundle.manifest.files:
        raise HipaError(
            f"{bundle.root} has no reference tensors of stage {stage}. Export the bundle again."
        )
    tensors = teacher_tensors(bundle) if is_teacher else Reference.read(bundle).tensors
    spec = bundle.all_stages[stage].spec
    layout = bundle.manifest.layout

    feed = {}
    expected = {}
    for tensor in (*spec.inputs, *spec.outputs):
        # The base UNet is no stage of the path, and its reference has its own names.
        name: str | None = tensor.name
        if not is_teacher:
            name = name_along_path(spec, tensor.name, layout)
        if name is None:
            continue  # an output that only optimum reads
        if name not in tensors:
            raise HipaError(
                f"{bundle.root}: the reference has no tensor {name!r}. Export the bundle again."
            )
        if tensor in spec.inputs:
            feed[tensor.name] = tensors[name].astype(tensor.dtype, copy=False)
        else:
            expected[tensor.name] = tensors[name]
    return StageReference(feed, expected)


def why_not_run(bundle: Bundle, stage: str, sms: Sequence[int], key: EngineKey) -> str | None:
    """Why an engine cannot be checked here; None if it can.

    Args:
        bundle: the bundle that has the stage.
        stage: the stage's name.
        sms: the compute capabilities that the engine is for, times ten.
        key: the engine's key.

    """
    gpu = find_gpu()
    if gpu is None:
        return "no NVIDIA GPU with a driver answers here"
    if gpu.sm not in sms:
        return f"the engine is for another GPU than {gpu.name} (SM{gpu.sm})"
    try:
        # A driver that does not answer says nothing of the engine.
        check_driver(load_cudart(key.flavour))
        stage_reference(bundle, stage)
    except HipaError as error:
        return str(error)
    return None


def check_engine(bundle: Bundle, stage: str, path: Path, key: EngineKey) -> EngineCheck:
    """Run the engine at ``path`` on the reference tensors, if this machine can run it.

    It never raises for an engine that is wrong or does not run: the result says so. A GPU without
    the memory for it says nothing of the engine, so that it was not run.
    """
    reason = why_not_run(bundle, stage, key.compute_capabilities, key)
    if reason is not None:
        return EngineCheck(outcome="not run", detail=reason)

    reference = stage_reference(bundle, stage)
    spec = bundle.all_stages[stage].spec
    try:
        got = run_engine(spec, path, key.flavour, reference.feed, key.barriers)
    except HipaError as error:
        if _NO_MEMORY.search(str(error)):
            # Where TensorRT met the error, nobody has read it yet: the next engine would find it.
            load_cudart(key.flavour).cudaGetLastError()
            return EngineCheck(outcome="not run", detail=f"the GPU has no memory for it: {error}")
        return EngineCheck(outcome="failed", detail=f"the engine does not run: {error}")
    return judge(got, reference.expected, bundle.all_stages[stage].precision)


def judge(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], precision: Precision
) -> EngineCheck:
    """Compare the outputs of a stage with the reference's, by the gate of ``precision``."""
    least = MIN_PSNR_DB[precision]
    worst: Parity | None = None
    problems = []
    for name, reference in expected.items():
        value = got[name]
        if value.shape != reference.shape:
            problems.append(
                f"{name} has shape {list(value.shape)}, the reference {list(reference.shape)}"
            )
            continue
        found = problem(value, reference, precision)
        if found is not None:
            problems.append(f"{name} {found}")
        if np.isfinite(value.astype(np.float32)).all():
            parity = compare(value, reference)
            if worst is None or parity.psnr_db < worst.psnr_db:
                worst = parity
    return EngineCheck(
        outcome="failed" if problems else "passed",
        detail="; ".join(problems),
        parity=worst,
        least_psnr_db=least,
    )


def run_engine(
    spec: StageSpec,
    path: Path,
    library: TensorRTLibrary,
    feed: Mapping[str, np.ndarray],
    barriers: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Run an engine once on this GPU; the outputs by name.

    Args:
        spec: the inputs and outputs that are wanted.
        path: the engine.
        library: what built it.
        feed: the inputs by name.
        barriers: outputs of the engine that nobody wants.

    Raises:
        HipaError: there is no driver, or the engine does not run.

    """
    # Imported here, because it needs the CUDA bindings, and a build without a GPU does not.
    from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner

    with TensorRTRunner([(spec, path)], library, barriers={spec.name: barriers}) as runner:
        return runner.run(dict(feed), [tensor.name for tensor in spec.outputs])
