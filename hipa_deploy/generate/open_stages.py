"""Load a bundle's stages on a backend: all at once, or in turn, which takes less memory.

This is the one place that knows every backend. Each backend's module is imported only where that
backend is chosen: none of them needs the others to be installed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, TEXT_STAGE_2, AdaptorSwap, adapted_stage
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import CPU_BACKENDS, ENGINE_BACKENDS, ClosesAtExit, Runner
from hipa_deploy.generate.stages import (
    CONTEXT_PARTS,
    Stages,
    Tensors,
    Timer,
    computed_names,
    host_stages,
    output_names,
    spared_by,
    taken_names,
)
from hipa_deploy.tasks import takes_source, unet_inputs

if TYPE_CHECKING:
    from hipa_deploy.engines.backends.compiled_cache import CompiledStage

TEXT_INPUTS = ("tokens", "tokens_2", "sizes")  # of the text stages, not all of them in every bundle
Kept = Literal["none", "use", "renew"]
Groups = tuple[tuple[str, ...], ...]
"""Names of stages; those of one group are loaded together, and one group at a time."""


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
    spec = bundle.all_stages[stage].spec
    if backend in CPU_BACKENDS:
        return _open_on_cpu(bundle, stage, backend, kept)
    if backend.startswith("onnxruntime"):
        from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner, engine_cache

        cache = engine_cache(bundle, stage, backend)
        return OnnxRuntimeRunner(path, spec, backend, cache=cache)
    from hipa_deploy.engines.store.select import open_engine

    return open_engine(bundle, stage, backend)


def has_engine(bundle: Bundle, stage: str, backend: str) -> bool:
    """Whether a stage has an engine that ``backend`` needs; True for backends that need none.

    The engine's files are looked for. Whether its key fits this device shows when it is loaded.

    Raises:
        HipaError: a sidecar of such an engine is damaged.

    """
    if backend not in ENGINE_BACKENDS:
        return True
    from hipa_deploy.engines.store.sidecar import find_sidecars
    from hipa_deploy.engines.tensorrt.library import as_tensorrt_library

    return bool(find_sidecars(bundle, stage, as_tensorrt_library(backend)))


def _open_on_cpu(bundle: Bundle, stage: str, backend: str, kept: Kept) -> Runner:
    """Load one stage on ONNX Runtime or OpenVINO, compiled now or at an earlier start."""
    path = bundle.stage_path(stage)
    spec = bundle.all_stages[stage].spec
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
    known = set(_text_inputs(bundle))
    known |= set(unet_inputs(manifest.task, len(manifest.strengths))) - {"source", "context"}
    if takes_source(manifest.task):
        known.add("image")
    generic = manifest.layout == "generic"
    pair = bool(manifest.text_widths)
    if generic:
        known |= {"timestep", "time_ids"} if pair else {"timestep"}

    if TEXT_STAGE_2 in bundle.stages and not (generic and pair):
        raise _unfit(bundle, f"it has the stage {TEXT_STAGE_2}")

    images = None
    for stage in manifest.stages:
        # A prompt that is remembered has no tokens any more, so no later stage may take them.
        if stage.spec.name not in CONTEXT_PARTS:
            known -= set(TEXT_INPUTS)
        for name in taken_names(stage.spec, manifest.layout):
            if name not in known:
                raise _unfit(bundle, f"stage {stage.spec.name} takes {shown(name)}")
        made = output_names(stage.spec, manifest.layout)
        if len(made) != _outputs(bundle, stage.spec.name):
            raise _unfit(bundle, f"stage {stage.spec.name} has {len(made)} outputs")
        # With what numpy makes after a stage of the generic layout.
        known |= set(computed_names(bundle, stage.spec.name))
        images = stage.spec.outputs[0]

    wants_pooled = manifest.refine and manifest.refine.takes_pooled
    if wants_pooled and TEXT_STAGE in bundle.stages and "pooled" not in known:
        raise _unfit(bundle, "the text stage gives no pooled vector for the base UNet")

    expected = "sample" if generic else "images"
    if images is None or images.name != expected or len(images.shape) != 4:
        raise _unfit(bundle, f"the last stage does not give {expected}")
    if not generic and (images.dtype != "uint8" or images.shape[3] != 3):
        raise _unfit(bundle, "the last stage gives no RGB images")


def _outputs(bundle: Bundle, stage: str) -> int:
    """How many tensors the path takes from a stage."""
    if not bundle.manifest.text_widths:
        return 1
    # SDXL's text stage gives the conditioning beside the context, and the pooled vector for a base
    # UNet; in the generic layout the second text encoder gives that vector beside its part of the
    # context.
    several = TEXT_STAGE if bundle.manifest.layout == "onestep" else TEXT_STAGE_2
    if stage != several:
        return 1
    return 3 if bundle.manifest.refine else 2


def _text_inputs(bundle: Bundle) -> tuple[str, ...]:
    """What the pipeline gives the stages of the prompt."""
    has_encoder = "text_encoder" in bundle.stages
    if not bundle.manifest.text_widths:
        return ("tokens",) if has_encoder else ("context",)
    return TEXT_INPUTS if has_encoder else ("context", "conditioning")


def _unfit(bundle: Bundle, problem: str) -> HipaError:
    layout = bundle.manifest.layout
    return HipaError(
        f"{bundle.root}: {problem}, which does not fit layout {layout} and task "
        f"{bundle.manifest.task}. Export the bundle again."
    )


def open_stages(
    bundle: Bundle, backend: str, *, low_memory: bool = False, kept: Kept = "none"
) -> Stages:
    """Load every stage on one backend (not 'auto').

    TensorRT runs the stages of the onestep layout as one CUDA graph. The generic layout has
    arithmetic of ours between its stages, so there the host hands tensors over on every backend.

    Args:
        bundle: the bundle.
        backend: what runs the stages.
        low_memory: load them in turn (``StagesInTurn``), none of them yet.
        kept: as ``open_runner`` takes it.

    Raises:
        HipaError: as ``open_runner`` and ``check_stages`` do. Stages that were loaded are released.

    """
    check_stages(bundle)
    if low_memory:
        return StagesInTurn(bundle, backend, _groups(bundle, backend), kept)
    return _open_together(bundle, tuple(bundle.path_stages), backend, None, kept)


def _groups(bundle: Bundle, backend: str) -> Groups:
    """Which stages are loaded together where memory is short."""
    if backend in ENGINE_BACKENDS:
        from hipa_deploy.engines.store.low_memory import engine_groups

        return engine_groups(bundle, bundle.path_stages, backend)
    # What a session of another backend holds once it has run is not known beforehand, so each is
    # alone. All stages are loaded once for an image in any case.
    return tuple((stage,) for stage in bundle.path_stages)


def _open_together(
    bundle: Bundle, names: tuple[str, ...], backend: str, swap: AdaptorSwap | None, kept: Kept
) -> Stages:
    """Load some stages of a bundle, with the weights of ``swap`` where it has other ones."""
    if backend in ENGINE_BACKENDS and bundle.manifest.layout == "onestep":
        from hipa_deploy.engines.store.select import open_engines

        stages = open_engines(bundle, names, backend)
        try:
            for stage in names:
                _adapt(bundle, stage, stages.runners[stage], backend, swap)
        except BaseException:
            stages.close()
            raise
        return stages

    if swap is None and kept == "use" and _all_kept(bundle, names, backend):
        return host_stages(bundle, backend, _open_side_by_side(bundle, names, backend))
    # One after the other: compiling takes memory that the next compilation uses again. If a stage
    # cannot be loaded, the stack closes those before it.
    with ExitStack() as opened:
        runners = {}
        for stage in names:
            runner = _open_adapted(bundle, stage, backend, swap, kept)
            runners[stage] = opened.enter_context(runner)
        opened.pop_all()  # all are loaded, so the stages own them now
    return host_stages(bundle, backend, runners)


def _all_kept(bundle: Bundle, names: tuple[str, ...], backend: str) -> bool:
    """Whether every stage is small, or lies compiled in this user's cache."""
    if backend not in CPU_BACKENDS:
        return False
    compiled = [_compiled(bundle, stage, backend, "use") for stage in names]
    return all(stage is None or stage.found() for stage in compiled)


def _open_side_by_side(bundle: Bundle, names: tuple[str, ...], backend: str) -> dict[str, Runner]:
    """Compiled stages all at once: each holds its own weights at the end, and no more meanwhile."""
    with ThreadPoolExecutor(len(names)) as pool:
        futures = {}
        for stage in names:
            futures[stage] = pool.submit(open_runner, bundle, stage, backend, kept="use")
    # If a stage cannot be loaded, the stack closes the others.
    with ExitStack() as opened:
        for future in futures.values():
            if future.exception() is None:
                opened.enter_context(future.result())
        runners = {stage: future.result() for stage, future in futures.items()}
        opened.pop_all()
    return runners


def _open_adapted(
    bundle: Bundle, stage: str, backend: str, swap: AdaptorSwap | None, kept: Kept
) -> Runner:
    """``open_runner`` with the weights of ``swap``. A session takes them as it is opened."""
    if swap is None or backend in ENGINE_BACKENDS:
        runner = open_runner(bundle, stage, backend, kept=kept)
        _adapt(bundle, stage, runner, backend, swap)
        return runner
    from hipa_deploy.generate.swap_stage import swap_stage, swap_text_encoder  # the engines

    if stage == adapted_stage(bundle):
        return swap_stage(bundle, None, backend, swap)
    if stage in swap.manifest.texts:
        return swap_text_encoder(bundle, backend, swap, stage)
    return open_runner(bundle, stage, backend, kept=kept)


def _adapt(
    bundle: Bundle, stage: str, runner: Runner, backend: str, swap: AdaptorSwap | None
) -> None:
    """Give a loaded engine the weights of ``swap``, if it is the stage that has them."""
    if swap is not None and stage == adapted_stage(bundle):
        from hipa_deploy.generate.swap_stage import swap_stage

        swap_stage(bundle, runner, backend, swap)


class StagesInTurn:
    """A bundle's stages of which only one group at a time is loaded: ``Stages`` in less memory.

    A group is closed before the next one is loaded, and the one that ran last stays loaded. Every
    stage runs as it does with all of them loaded, from the same files and on the same inputs, so
    the images are the same bytes; what passes between groups goes through host memory. Calls at
    the same time wait for each other.

    Args:
        bundle: the bundle.
        backend: what runs the stages.
        groups: the stages from a prompt to an image, in the order in which they run. A safety
            checker is a group by itself, which only a call of its runner loads.
        kept: as ``open_runner`` takes it; 'renew' compiles anew, and keeps nothing.

    Attributes:
        runners: each stage by itself. A call of one loads its group.
        device_memory_mib: the most device memory that a group has taken so far.
        has_profiler: whether the backend's runners have ``profile_layers``.

    """

    def __init__(self, bundle: Bundle, backend: str, groups: Groups, kept: Kept = "none") -> None:
        self.groups = groups
        # A stage that is loaded at every image is not compiled into the cache each time.
        self._kept: Kept = "none" if kept == "renew" else kept
        self.has_profiler = backend in ENGINE_BACKENDS
        self.device_memory_mib: int | None = None
        self.runners: dict[str, Runner] = {}
        for name in bundle.stages:
            self.runners[name] = RunnerInTurn(self, name, bundle)
        self._bundle = bundle
        self._backend = backend
        self._swap: AdaptorSwap | None = None
        self._loaded: tuple[tuple[str, ...], Stages] | None = None
        self._closed = False
        self._one_call = threading.RLock()

    def __str__(self) -> str:
        """The groups in words: 'text_encoder, then unet + vae_decoder'."""
        return ", then ".join(" + ".join(group) for group in self.groups)

    def run(
        self, feed: Mapping[str, np.ndarray], outputs: Sequence[str], timer: Timer = nullcontext
    ) -> Tensors:
        """Run what is needed, a group after the other; see ``Stages.run``."""
        with self._one_call:
            tensors = dict(feed)
            for group in self.groups:
                wanted = self._wanted(group, tensors, outputs)
                if wanted:
                    stages = self.load(group)
                    tensors |= stages.run(self._feed(group, tensors), wanted, timer)
                    self._note_memory(stages)
            return {name: tensors[name] for name in outputs}

    def run_on_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The last group's outputs on the device; those before it run as in ``run``."""
        with self._one_call:
            last = self.groups[-1]
            needed = self._taken((last,), feed)
            tensors = dict(feed) | self.run(feed, [name for name in needed if name not in feed])
            stages = self.load(last)
            arrays = stages.run_on_device(self._feed(last, tensors))
            self._note_memory(stages)
            return arrays

    def _wanted(
        self, group: tuple[str, ...], known: Mapping[str, Any], outputs: Sequence[str]
    ) -> list[str]:
        """What this group computes that was asked for, or that a later group takes."""
        later = self.groups[self.groups.index(group) + 1 :]
        needed = {*outputs, *self._taken(later, known)}
        computed: list[str] = []
        for stage in group:
            computed += computed_names(self._bundle, stage)
        return [name for name in computed if name in needed and name not in known]

    def _taken(self, groups: Iterable[tuple[str, ...]], known: Mapping[str, Any]) -> list[str]:
        """What the stages of ``groups`` take from outside, but for those that need not run."""
        layout = self._bundle.manifest.layout
        taken: list[str] = []
        made: list[str] = []
        for group in groups:
            for name in group:
                spec = self._bundle.stages[name].spec
                if spared_by(spec, layout) <= known.keys():
                    continue
                taken += [name for name in taken_names(spec, layout) if name not in made]
                made += computed_names(self._bundle, spec.name)
        return taken

    def _feed(self, group: tuple[str, ...], tensors: Mapping[str, np.ndarray]) -> Tensors:
        """Exactly what this group takes: an engine refuses more."""
        feed = {name: tensors[name] for name in self._taken((group,), tensors) if name in tensors}
        # What is known already keeps its stage from running.
        for stage in group:
            for name in computed_names(self._bundle, stage):
                if name in tensors:
                    feed[name] = tensors[name]
        return feed

    def load(self, group: tuple[str, ...]) -> Stages:
        """The stages of ``group``, loaded, after those of another group are released.

        Raises:
            HipaError: a stage cannot be loaded, or the pipeline is closed. Nothing is loaded then.

        """
        if self._closed:
            raise HipaError(f"{self._bundle.root}: the pipeline is closed.")
        if self._loaded is not None and self._loaded[0] == group:
            return self._loaded[1]
        self._release()
        for name in group:
            self._bundle.check_unchanged(name)
        stages = _open_together(self._bundle, group, self._backend, self._swap, self._kept)
        self._loaded = (group, stages)
        return stages

    def load_stage(self, name: str) -> Runner:
        """One stage, loaded with its group; it is valid until another group is loaded."""
        for group in self.groups:
            if name in group:
                return self.load(group).runners[name]
        return self.load((name,)).runners[name]

    def loaded_stage(self, name: str) -> Runner | None:
        """One stage, if it is loaded now."""
        return None if self._loaded is None else self._loaded[1].runners.get(name)

    def swap(self, swap: AdaptorSwap | None) -> None:
        """Take another adaptor's weights: in what is loaded from now on, which is tried at once.

        An engine is refitted and checked every time that it is loaded.

        Raises:
            HipaError: as ``swap_stage`` and ``swap_text_encoder`` do. The weights are as before.

        """
        with self._one_call:
            before = self._swap
            self._release()
            self._swap = swap
            try:
                for stage in swap.manifest.texts if swap is not None else ():
                    from hipa_deploy.generate.swap_stage import swap_text_encoder

                    swap_text_encoder(self._bundle, self._backend, swap, stage).close()
                self.load_stage(adapted_stage(self._bundle))
            except BaseException:
                self._swap = before
                raise

    def make_room(self) -> None:
        """Release what is loaded, for a model that is loaded in its place.

        Whoever holds ``one_call`` has the memory to itself until it lets go.
        """
        with self._one_call:
            self._release()

    def one_call(self) -> threading.RLock:
        """What every call holds while it runs."""
        return self._one_call

    def _note_memory(self, stages: Stages) -> None:
        for runner in stages.runners.values():
            mib = getattr(runner, "device_memory_mib", None)
            if mib is not None:
                self.device_memory_mib = max(mib, self.device_memory_mib or 0)

    def _release(self) -> None:
        loaded = self._loaded
        self._loaded = None
        if loaded is not None:
            loaded[1].close()

    def close(self) -> None:
        """Release what is loaded. Calling it twice is harmless."""
        with self._one_call:
            self._closed = True
            self._release()


class RunnerInTurn(ClosesAtExit):
    """One stage of ``StagesInTurn``: a call loads its group first. ``close`` closes the whole."""

    def __init__(self, owner: StagesInTurn, name: str, bundle: Bundle) -> None:
        self.spec = bundle.stages[name].spec
        self._owner = owner
        self._name = name

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the stage's outputs by name."""
        with self._owner.one_call():
            return self._owner.load_stage(self._name)(**inputs)

    @property
    def device_ms(self) -> float | None:
        """As the stage's own; None while it is not loaded."""
        ms: float | None = getattr(self._owner.loaded_stage(self._name), "device_ms", None)
        return ms

    @property
    def device_memory_mib(self) -> int | None:
        """The most that a group of stages has taken so far."""
        return self._owner.device_memory_mib

    @property
    def profile_layers(self) -> Callable[..., Any] | None:
        """As the stage's own, which is loaded when this is called; None where none has it."""
        return self._profile_layers if self._owner.has_profiler else None

    def _profile_layers(self, **inputs: np.ndarray) -> Any:
        with self._owner.one_call():
            runner: Any = self._owner.load_stage(self._name)
            return runner.profile_layers(**inputs)

    def close(self) -> None:
        """Close all stages."""
        self._owner.close()
