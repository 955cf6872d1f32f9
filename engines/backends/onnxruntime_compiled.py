"""ONNX Runtime's optimised graph as a file, its weights mapped and not copied.

What ONNX Runtime does to a graph at every start, it does once: it casts float16 weights to the
float32 that a CPU computes in, folds constants, reorders convolutions' weights for the processor,
and packs those of matrix products, where that is safe (``saves_packed``). All of this lies in one
file of external data beside the optimised graph, which ONNX Runtime maps. So the weights take no
memory of the process's own, and the arithmetic is the same, bit for bit.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hipa_deploy.engines.backends.compiled_cache import CompiledStage

_MODEL = "model.onnx"
_WEIGHTS = "model.onnx.data"
# Smaller weights stay in the graph's own file: shapes and scalars, which optimisers read.
_SMALLEST_WEIGHT = 1024  # bytes
_PROVIDERS = ["CPUExecutionProvider"]


# The first release that is known to begin what it packed at a multiple of 64 bytes.
_FIRST_ALIGNED = (1, 32)


def saves_packed(version: str) -> bool:
    """Whether this ONNX Runtime can map the weights that it packed itself.

    Releases before 1.32 put them at any offset of the file, and read them from there with
    instructions that need a multiple of 64: most of 1.23 to 1.31 crashed on the embedded model, on
    a processor with AVX-512. They pack the weights anew at every start.

    Example:
        >>> saves_packed("1.23.2")
        False

    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= _FIRST_ALIGNED


def optimised_session(
    onnxruntime: Any, path: Path, options: Callable[[bool], Any], compiled: CompiledStage
) -> Any:
    """A session of the optimised form of the graph at ``path``, which is made if it is not there.

    Args:
        onnxruntime: the module.
        path: the stage's ONNX file.
        options: given whether to optimise, makes the SessionOptions.
        compiled: where the optimised form is kept.

    Returns:
        An InferenceSession on the CPU; None if the optimised form cannot be made or loaded.

    """

    def make(folder: Path) -> None:
        saving = options(True)
        saving.optimized_model_filepath = str(folder / _MODEL)
        for name, value in (
            ("session.optimized_model_external_initializers_file_name", _WEIGHTS),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _SMALLEST_WEIGHT),
            (
                "session.save_external_prepacked_constant_initializers",
                int(saves_packed(onnxruntime.__version__)),
            ),
        ):
            saving.add_session_config_entry(name, str(value))
        onnxruntime.InferenceSession(str(path), saving, providers=_PROVIDERS)

    if not compiled.found() and not compiled.write(make):
        return None
    # Without optimisation: a graph that is optimised twice may round otherwise.
    loading = options(False)
    share_one_arena(onnxruntime)
    loading.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return onnxruntime.InferenceSession(
            str(compiled.folder / _MODEL), loading, providers=_PROVIDERS
        )
    except Exception:  # damaged, or removed by another process meanwhile
        compiled.discard()
        return None


_ONE_ARENA = threading.Lock()


def share_one_arena(onnxruntime: Any) -> None:
    """Make the process's one arena for the tensors of all stages, if it is not made yet.

    Stages run one after the other, and by default each keeps the memory of its largest run for
    itself. The weights are mapped, so nothing that outlives a run lies in the arena. It stays as
    long as the process: another pipeline uses it again.

    """
    # functools.cache alone would let two threads make two at the first call.
    with _ONE_ARENA:
        _new_arena(onnxruntime)


@functools.cache
def _new_arena(onnxruntime: Any) -> None:
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # The default doubles every new block; this takes what is asked for.
    no_limit, as_requested, default = 0, 1, -1
    settings = onnxruntime.OrtArenaCfg(no_limit, as_requested, default, default)
    # A program around us may have made an arena of its own for this; then that one is shared.
    with suppress(Exception):
        onnxruntime.create_and_register_allocator(memory, settings)
