"""The base UNet of a bundle, run in many guided steps, and the checks of a request for that.

Shapes: B batch, C latent channels, h, w latent height and width, L tokens, D width of a context,
P width of SDXL's pooled vector, T timesteps of the noise schedule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Real

import numpy as np

from hipa_deploy.bundle.arrays import Header, bounded, read_npz
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Refinement, RefineSettings
from hipa_deploy.errors import HipaError, RequestError, brief, whole_number
from hipa_deploy.generate.open_stages import has_engine, open_runner
from hipa_deploy.generate.refine.solver import make_solver
from hipa_deploy.generate.runner import Runner
from hipa_deploy.generate.stages import Timer
from hipa_deploy.tasks import size_numbers

Progress = Callable[[int, int], None]
"""Called with the steps that are done and the steps in all."""

TEXT_TENSORS = ("context", "pooled")  # what the base UNet takes of a prompt
SAMPLERS = ("dpmsolver++", "ddim")
LEAST_STEPS = 2
MOST_STEPS = 1000
LEAST_GUIDANCE = 1.0
MOST_GUIDANCE = 30.0
_MAX_TABLES = 1 << 26  # bytes; a context of 231 tokens and 1,024 numbers each is one of them


def refinement_of(bundle: Bundle, backend: str = "auto") -> Refinement:
    """What ``bundle`` refines with.

    Args:
        bundle: the bundle.
        backend: what is to run it.

    Raises:
        HipaError: the bundle does not refine, or that backend cannot.

    """
    manifest = bundle.manifest
    if manifest.task != "generate":
        raise HipaError(
            f"{bundle.root} is for the task {manifest.task}, which is not refined. "
            "Use a bundle for the task generate."
        )
    if manifest.refine is None:
        raise HipaError(
            f"{bundle.root} does not have the base model that refines. Export it with "
            "--with-teacher."
        )
    if not has_engine(bundle, manifest.refine.stage.spec.name, backend):
        raise HipaError(
            f"{bundle.root} has no {backend} engine of the base model, which refines. "
            f"Run: hipa-build {bundle.root} --backend {backend}"
        )
    return manifest.refine


def refine_settings(
    bundle: Bundle,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    backend: str = "auto",
) -> RefineSettings:
    """Check a request to refine, and fill in what the adaptor's teacher did.

    Args:
        bundle: the bundle.
        steps: of the sampler, 2 to 1000 and at most the schedule's.
        guidance: of classifier-free guidance, 1 to 30.
        sampler: 'dpmsolver++' or 'ddim'.
        backend: what is to run it.

    Raises:
        HipaError: the bundle does not refine, a backend that cannot, or a value out of range.

    Example:
        >>> refine_settings(bundle, steps=10)
        RefineSettings(sampler='dpmsolver++', steps=10, guidance=3.0)

    """
    own = refinement_of(bundle, backend).settings
    if steps is None:
        steps = own.steps
    if guidance is None:
        guidance = own.guidance
    if sampler is None:
        sampler = own.sampler
    steps = whole_number(steps, "steps")
    if not LEAST_STEPS <= steps <= MOST_STEPS:
        raise RequestError(
            f"steps is {brief(steps)}. Expected a whole number of {LEAST_STEPS} to {MOST_STEPS}.",
            argument="steps",
        )
    is_number = isinstance(guidance, Real) and not isinstance(guidance, bool)
    if not is_number or not LEAST_GUIDANCE <= guidance <= MOST_GUIDANCE:
        raise RequestError(
            f"guidance is {brief(guidance)}. Expected {LEAST_GUIDANCE:g} to {MOST_GUIDANCE:g}; "
            "1 is none.",
            argument="guidance",
        )
    if sampler not in SAMPLERS:
        raise RequestError(
            f"sampler {brief(sampler)} is unknown. Expected one of: {', '.join(SAMPLERS)}.",
            argument="sampler",
        )
    return RefineSettings(sampler=sampler, steps=steps, guidance=float(guidance))


class Refiner:
    """The base UNet of one bundle, loaded on one backend when it is used first.

    Any thread may call it.

    Args:
        bundle: the bundle.
        backend: what runs the UNet, not 'auto'.

    """

    def __init__(self, bundle: Bundle, backend: str) -> None:
        self._bundle = bundle
        self._backend = backend
        self._loading = threading.Lock()
        self._runner: Runner | None = None
        self._tables: dict[str, np.ndarray] = {}
        self._closed = False

    def latents(
        self,
        noise_BCHW: np.ndarray,
        text: Mapping[str, np.ndarray],
        settings: RefineSettings,
        timer: Timer = nullcontext,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """The base model's scaled latents, float32 [B, C, h, w].

        With classifier-free guidance (Ho & Salimans 2022) the UNet is asked twice a step, with the
        prompt and with the empty one.

        Args:
            noise_BCHW: float32, standard normal.
            text: of the prompts, in the type that the bundle's text stage gives: 'context'
                [B, L, D], and of SDXL 'pooled' [B, P].
            settings: sampler, steps and guidance.
            timer: called with 'teacher' around each call of the UNet.
            progress: called before the first step and after each.

        Raises:
            HipaError: more steps than the schedule has, a backend that fails, or a damaged file.

        """
        unet = self._load()
        alpha_bars_T = self._tables["alpha_bars"]
        if settings.steps > len(alpha_bars_T):
            raise RequestError(
                f"steps is {settings.steps}, and the noise schedule has {len(alpha_bars_T)} "
                "timesteps. Take fewer steps.",
                argument="steps",
            )
        prediction_type = self._bundle.manifest.one_step.prediction_type
        solver = make_solver(settings, alpha_bars_T, prediction_type)
        prompted = self._conditions(text, noise_BCHW)
        empty = {}
        for name in TEXT_TENSORS:
            if name in text:
                empty[name] = np.repeat(self._tables[f"empty_{name}"], len(noise_BCHW), axis=0)
        unguided = self._conditions(empty, noise_BCHW)

        def predict(
            sample_BCHW: np.ndarray, timestep: int, conditions: Sequence[np.ndarray]
        ) -> np.ndarray:
            return _ask(unet, sample_BCHW, timestep, conditions, timer)

        total = len(solver.timesteps)
        x_BCHW = noise_BCHW
        for index, timestep in enumerate(solver.timesteps):
            if progress:
                progress(index, total)
            output_BCHW = predict(x_BCHW, timestep, prompted)
            if settings.guidance != 1:
                without_BCHW = predict(x_BCHW, timestep, unguided)
                guidance = np.float32(settings.guidance)
                output_BCHW = without_BCHW + guidance * (output_BCHW - without_BCHW)
            x_BCHW = solver.step(index, x_BCHW, output_BCHW)
        if progress:
            progress(total, total)
        return x_BCHW

    def _conditions(
        self, text: Mapping[str, np.ndarray], noise_BCHW: np.ndarray
    ) -> list[np.ndarray]:
        """What the UNet takes after latents and timestep, in the order of its inputs."""
        refinement = self._bundle.manifest.refine
        assert refinement is not None  # its UNet is loaded
        if not refinement.takes_pooled:
            return [text["context"]]
        step = self._bundle.manifest.one_step
        pixels = step.height // step.latent_shape[1]
        batch, _, height, width = noise_BCHW.shape
        sizes = size_numbers(height * pixels, width * pixels)
        return [text["context"], text["pooled"], np.repeat([sizes], batch, axis=0)]

    def _load(self) -> Runner:
        with self._loading:
            if self._closed:
                raise HipaError("the pipeline is closed. Load the bundle again.")
            if self._runner is None:
                refinement = refinement_of(self._bundle, self._backend)
                name = refinement.stage.spec.name
                self._bundle.check_unchanged(name)
                self._tables = read_tables(self._bundle, refinement)
                self._runner = open_runner(self._bundle, name, self._backend)
            return self._runner

    def release(self) -> None:
        """Release the UNet until it is used again. No call may be under way."""
        with self._loading:
            runner = self._runner
            self._runner = None
            if runner is not None:
                runner.close()

    def close(self) -> None:
        """Release the UNet for good. Calling it twice is harmless."""
        with self._loading:
            self._closed = True
        self.release()


def _ask(
    unet: Runner,
    sample_BCHW: np.ndarray,
    timestep: int,
    conditions: Sequence[np.ndarray],
    timer: Timer,
) -> np.ndarray:
    """What the UNet predicts, float32 [B, C, h, w]."""
    values = (sample_BCHW, np.asarray([timestep]), *conditions)
    feed = {}
    for tensor, value in zip(unet.spec.inputs, values, strict=True):
        feed[tensor.name] = value.astype(tensor.dtype, copy=False)
    with timer(unet.spec.name):
        output_BCHW = unet(**feed)[unet.spec.outputs[0].name]
    return output_BCHW.astype(np.float32, copy=False)


def read_tables(bundle: Bundle, refinement: Refinement) -> dict[str, np.ndarray]:
    """``alpha_bars`` float32 [T] and ``empty_context`` [1, L, D] of a bundle that refines.

    Of SDXL also ``empty_pooled`` [1, P].

    Raises:
        HipaError: the file is damaged, or is another's.

    """
    # What guidance leads away from has the type and shape of what it leads to.
    empty = {"empty_context": refinement.stage.spec.inputs[2]}
    if refinement.takes_pooled:
        empty["empty_pooled"] = refinement.stage.spec.inputs[3]

    def check(name: str, found: Header) -> str | None:
        dtype, shape = found
        if name == "alpha_bars" and dtype == np.float32 and len(shape) == 1:
            return bounded(found)
        tensor = empty.get(name)
        if tensor is not None and dtype == tensor.dtype and shape == (1, *tensor.shape[1:]):
            return None
        return f"{brief(name)} is {dtype} {list(shape)}"

    path = bundle.path(refinement.tables)
    tables = read_npz(path, check, max_bytes=_MAX_TABLES)
    whole = tables.keys() == {"alpha_bars", *empty}
    if not whole or not _is_schedule(tables["alpha_bars"]):
        raise HipaError(f"{path} has no noise schedule. Export the bundle again.")
    if not all(np.isfinite(tables[name]).all() for name in empty):
        raise HipaError(f"{path} has NaN or infinity. Export the bundle again.")
    return tables


def _is_schedule(alpha_bars_T: np.ndarray) -> bool:
    """Whether the signal fades from each timestep to the next, in [0, 1)."""
    in_range = bool((alpha_bars_T[:1] < 1).all() and (alpha_bars_T >= 0).all())
    return in_range and bool((np.diff(alpha_bars_T) < 0).all())
