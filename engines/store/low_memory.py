"""How ``--low-memory`` groups the engines of a bundle on this device."""

from __future__ import annotations

from collections.abc import Iterable

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Stage
from hipa_deploy.engines.device.machine import available_memory_mib
from hipa_deploy.engines.store.select import select_engine
from hipa_deploy.engines.store.sidecar import Sidecar, read_sidecar
from hipa_deploy.engines.targets.run_memory import (
    Groups,
    StageSize,
    engine_activations_mib,
    low_memory_groups,
)
from hipa_deploy.engines.tensorrt.buffers import shares_memory
from hipa_deploy.engines.tensorrt.cuda import call, load_cudart
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.library import (
    TensorRTLibrary,
    as_tensorrt_library,
    load_tensorrt,
)

# Our allowance, not measured: inputs, outputs, CUDA graphs and TensorRT's own set-up.
RESERVE_MIB = 256


def engine_groups(bundle: Bundle, stages: Iterable[str], backend: str) -> Groups:
    """The groups in which the engines of ``stages`` are loaded, one group at a time.

    Raises:
        HipaError: as ``open_engines`` does where a stage has no engine for this device.

    """
    library = as_tensorrt_library(backend)
    version = load_tensorrt(library).__version__
    gpu = find_gpu()
    sizes = []
    for name in stages:
        # Without a GPU nothing is loaded either: ``open_engines`` says what is missing.
        sidecar = None
        if gpu is not None:
            sidecar = read_sidecar(select_engine(bundle, name, library, version, gpu))
        sizes.append(engine_size(bundle.stages[name], sidecar))
    return low_memory_groups(sizes, None if gpu is None else _room_mib(library))


def engine_size(stage: Stage, sidecar: Sidecar | None) -> StageSize:
    """What an engine holds: by its sidecar, and where that does not say, by the stage's graph."""
    weights = 0 if sidecar is None else in_mib(sidecar.engine_bytes)
    activations = None
    if sidecar is not None and sidecar.activation_bytes is not None:
        activations = in_mib(sidecar.activation_bytes)
    elif stage.cost is not None and stage.cost.engine_activation_bytes is not None:
        activations = engine_activations_mib(stage.cost.engine_activation_bytes)
    return StageSize(stage=stage.spec.name, weights=weights, activations=activations)


def in_mib(size: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-size // (1 << 20))


def _room_mib(library: TensorRTLibrary) -> int | None:
    """MiB that engines may take now; None where that is not known.

    Where GPU and host share one memory, CUDA does not count what the kernel would give up of its
    cache of files, such as that of the engines themselves. The kernel does.
    """
    cudart = load_cudart(library)
    free: int | None = call(cudart, "cudaMemGetInfo") >> 20
    if shares_memory(cudart):
        free = available_memory_mib()
    return None if free is None else free - RESERVE_MIB
