"""The numbers of a one-step method on a model, measured on the scheduler of diffusers itself.

What a scheduler does in its only step is linear in the noise and in the UNet's output. Three
numbers say all of it, and measured ones are right for any class of scheduler. Tests compare them
with the formulas of the papers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from hipa_deploy.bundle.manifest import StepMethod
from hipa_deploy.errors import HipaError, as_line, brief
from hipa_deploy.models.model_config import LEAST_SIGNAL, ModelConfig, scheduler_values
from hipa_deploy.models.one_step.one_step_method import OneStepMethod, check_fits
from hipa_deploy.models.weights.part_config import defaults_of, known_values

LINEAR_WITHIN = 1e-4  # relative; float32 is a hundred times finer, clipping is far coarser
# Euler's sample at a schedule that ends in pure noise is 4,096 times the noise, in float32.
ROUNDING = 5e-7  # of the largest value on the way


@dataclass(frozen=True)
class StepConstants:
    """The constants of a method's step on a model.

    Attributes:
        timestep: where it starts.
        alpha_bar: cumulative signal power there, in [0, 1].
        prediction_type: what the UNet predicts.
        method: the numbers, as the manifest has them.

    """

    timestep: int
    alpha_bar: float
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    method: StepMethod


def step_constants(method: OneStepMethod, config: ModelConfig) -> StepConstants:
    """The constants of ``method``'s one step on a model.

    Raises:
        HipaError: the method is not for this model; diffusers has no such scheduler or it has no
            such setting; it cannot start at this timestep, or there is no signal there; or its step
            is not linear (it clips) or adds noise.

    """
    check_fits(method, config)
    prediction_type: Any = method.prediction_type or config.prediction_type
    if method.factors is not None:
        alpha_bar = config.alpha_bar(method.timestep)
        numbers = StepMethod(
            name=method.name, scheduler="none", **method.factors.model_dump(mode="python")
        )
        return StepConstants(method.timestep, alpha_bar, prediction_type, numbers)

    # A setting of the method may be out of the range that its scheduler can compute.
    with as_line(f"one-step method {method.name} cannot take its step", "Correct [settings]."):
        return _measured(method, config, prediction_type)


def _measured(
    method: OneStepMethod,
    config: ModelConfig,
    prediction_type: Literal["epsilon", "v_prediction", "sample"],
) -> StepConstants:
    """The constants of a method that has a scheduler; errors as for ``step_constants``."""
    scheduler = make_scheduler(method, config)
    alphas = scheduler.alphas_cumprod
    if method.timestep >= len(alphas):
        raise HipaError(
            f"one-step method {method.name}: timestep {method.timestep} is out of range. "
            f"Expected 0 to {len(alphas) - 1} for {config.folder}."
        )
    alpha_bar = float(alphas[method.timestep])
    if prediction_type == "epsilon" and alpha_bar < LEAST_SIGNAL:
        raise HipaError(
            f"one-step method {method.name}: timestep {method.timestep} has no signal, so eps says "
            "nothing about x0. Choose a smaller timestep, or a model that predicts v."
        )
    return StepConstants(method.timestep, alpha_bar, prediction_type, _measure(method, config))


def make_scheduler(method: OneStepMethod, config: ModelConfig) -> Any:
    """The method's scheduler, as its authors make it: ``from_config`` of the model's own.

    The noise schedule is the model's, unless the method's settings say another.

    Raises:
        HipaError: diffusers has no such scheduler of DDPM's family, or it has no such setting.

    """
    from diffusers import schedulers

    kind: Any = getattr(schedulers, method.scheduler or "", None)
    known = defaults_of(kind) if inspect.isclass(kind) else {}
    if not {"beta_start", "beta_schedule", "prediction_type"} <= set(known):
        raise HipaError(
            f"one-step method {method.name}: scheduler = {brief(method.scheduler)} is no scheduler "
            "of DDPM's family in diffusers. Expected a class such as LCMScheduler, TCDScheduler or "
            "EulerDiscreteScheduler, or [factors] in its place."
        )
    unknown = sorted(set(method.settings) - set(known))
    if unknown:
        raise HipaError(
            f"one-step method {method.name}: {method.scheduler} has no setting "
            f"{brief(unknown[0])}. Remove it from [settings]."
        )
    settings = known_values(kind, method.settings, Path(method.name))
    if method.prediction_type:
        settings["prediction_type"] = method.prediction_type
    # What diffusers does: keys that the model's file leaves out have the defaults of this class.
    stated = scheduler_values(config.folder, kind)
    schedule = {key: value for key, value in config.schedule.items() if key in known}
    # ImportError, for one: some schedulers need scipy or torchsde.
    with as_line(
        f"one-step method {method.name}: {method.scheduler} cannot be made", "Correct [settings]."
    ):
        return kind.from_config({**stated, **schedule}, **settings)


def start(scheduler: Any, timestep: int) -> dict[str, Any]:
    """Set ``scheduler`` to one step at ``timestep``.

    Returns:
        What a diffusers pipeline is called with for the same: ``num_inference_steps=1``, or also
        ``timesteps=[timestep]``.

    Raises:
        HipaError: it cannot start there.

    """
    scheduler.set_timesteps(1)
    if _starts_at(scheduler, timestep):
        return {"num_inference_steps": 1}
    found = [round(float(value)) for value in scheduler.timesteps]
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        # diffusers warns of every step that does not start at the last timestep.
        with _no_warnings():
            scheduler.set_timesteps(timesteps=[timestep])
        if _starts_at(scheduler, timestep):
            return {"num_inference_steps": 1, "timesteps": [timestep]}
    raise HipaError(
        f"{type(scheduler).__name__} cannot take one step from timestep {timestep}: with these "
        f"settings it steps at {', '.join(map(str, found))}. For the last timestep set "
        'timestep_spacing = "trailing"; for another use LCMScheduler or TCDScheduler.'
    )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep diffusers from warning inside the block."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _starts_at(scheduler: Any, timestep: int) -> bool:
    return [float(value) for value in scheduler.timesteps] == [float(timestep)]


def _measure(method: OneStepMethod, config: ModelConfig) -> StepMethod:
    """What the scheduler does to noise and output in its one step, as three numbers."""
    import torch

    # One and zero show each factor alone; random values show whether there is anything else.
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(1, 4, 8, 8)
    noise, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
    probe = _take(method, config, ones, 0 * ones)
    noise_scale = float(probe.seen.mean())
    sample_factor = float(probe.made.mean()) / noise_scale
    output_factor = float(_take(method, config, 0 * ones, ones).made.mean())

    probe = _take(method, config, noise, output)
    expected = sample_factor * noise_scale * noise + output_factor * output
    tolerance = LINEAR_WITHIN * float(expected.abs().max())
    tolerance += ROUNDING * float(probe.sample.abs().max())
    if not torch.allclose(probe.made, expected, rtol=0, atol=tolerance):
        raise HipaError(
            f"one-step method {method.name}: what {method.scheduler} gives is not linear in noise "
            f"and output{_why(method, config)}. Such a step is not supported."
        )
    try:
        return StepMethod(
            name=method.name,
            scheduler=str(method.scheduler),
            noise_scale=noise_scale,
            sample_factor=sample_factor,
            output_factor=output_factor,
        )
    except ValidationError:
        raise HipaError(
            f"one-step method {method.name}: {method.scheduler} gives numbers that are not finite "
            f"at timestep {method.timestep}. Choose another timestep."
        ) from None


class _Step(NamedTuple):
    """A scheduler's only step: its sample, what the UNet sees of it, and what the step gives."""

    sample: Any
    seen: Any
    made: Any


def _take(method: OneStepMethod, config: ModelConfig, noise: Any, output: Any) -> _Step:
    """One step, as StableDiffusionPipeline takes it."""
    import torch

    # Schedulers remember their steps: each probe has one of its own.
    scheduler = make_scheduler(method, config)
    start(scheduler, method.timestep)
    timestep = scheduler.timesteps[0]
    keywords = {}
    if method.eta is not None:
        if "eta" not in inspect.signature(scheduler.step).parameters:
            raise HipaError(
                f"one-step method {method.name}: {method.scheduler} has no eta. Remove it."
            )
        keywords["eta"] = method.eta
    sample = noise * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(sample, timestep)
    with torch.random.fork_rng(devices=[]):
        made = scheduler.step(output, timestep, sample, **keywords).prev_sample
    return _Step(sample, seen, made)


def _why(method: OneStepMethod, config: ModelConfig) -> str:
    """Which settings make a step nonlinear."""
    scheduler = make_scheduler(method, config)
    known = inspect.signature(type(scheduler).__init__).parameters
    clips = [key for key in ("clip_sample", "thresholding") if key in known]
    found = [f"{key} = true" for key in clips if scheduler.config.get(key)]
    return f" ({', '.join(found)})" if found else " (it may add noise: set eta = 0)"
