"""One-step methods that others made: presets (``one_step/*.toml``) and files of users.

A method is named as its authors state it: a scheduler of diffusers, a timestep, settings. What
that scheduler does in its only step is linear in the noise and in the UNet's output. The three
numbers of that are measured on the scheduler itself, so they are right for any class of it.

Reading a file needs no diffusers; measuring a scheduler does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from hipa_deploy.bundle.manifest import StepMethod
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.models.kind import read_config
from hipa_deploy.models.model_config import LEAST_SIGNAL, ModelConfig
from hipa_deploy.record import Record

# Python 3.10 has no tomllib.
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "one_step"
OWN = "hipa"  # the name of HiPA's own step, x0 at the last timestep: no method at all
# Width of the text context, by which a model's family is known.
FAMILIES = {"sd1": ("SD 1.x", 768), "sd2": ("SD 2.x", 1024), "sdxl": ("SDXL", 2048)}
LINEAR_WITHIN = 1e-4  # relative; float32 is a hundred times finer, clipping is far coarser


class Factors(Record):
    """The three numbers of a method that no scheduler of diffusers has; see ``StepMethod``."""

    noise_scale: float = Field(gt=0, allow_inf_nan=False)
    sample_factor: float = Field(allow_inf_nan=False)
    output_factor: float = Field(allow_inf_nan=False)


class OneStepMethod(Record):
    """A one-step method, as its TOML file says it.

    Attributes:
        name: of the preset or file.
        source: where its authors state these values.
        note: what a user should know of it; may be empty.
        family: the models that it is for: sd1, sd2 or sdxl; None for any.
        needs_adaptor: whether it is a LoRA; False for a model that is one-step itself.
        scheduler: a class of diffusers, made ``from_config`` of the model's scheduler.
        settings: keywords that the authors give to ``from_config``.
        factors: in place of ``scheduler``.
        timestep: where the step starts, from 0 on.
        prediction_type: what the UNet predicts; None for what the model's scheduler says.
        guidance_scale: in [0, 1], where diffusers calls the UNet once, without guidance.
        eta: what the authors give to the pipeline; None is the scheduler's default.

    """

    name: str
    source: str = Field(min_length=1)
    note: str = ""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    needs_adaptor: bool = False
    scheduler: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    factors: Factors | None = None
    timestep: int = Field(ge=0, strict=True)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    guidance_scale: float = Field(default=0.0, ge=0, le=1)
    eta: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_source_of_numbers(self) -> OneStepMethod:
        if (self.scheduler is None) == (self.factors is None):
            raise ValueError("expected either scheduler or [factors]")
        return self


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


def preset_names() -> list[str]:
    """The names that ``--one-step`` knows, HiPA's own first."""
    return [OWN, *sorted(path.stem for path in PRESETS.glob("*.toml"))]


def load_method(name: str) -> OneStepMethod | None:
    """Read a preset or a file.

    Args:
        name: one of ``preset_names()``, or a .toml file.

    Returns:
        The method; None for 'hipa', HiPA's own step.

    Raises:
        HipaError: there is neither, it is not TOML, or a key or value is wrong.

    Example:
        >>> load_method("hyper-sd15").scheduler
        'TCDScheduler'

    """
    if name == OWN:
        return None
    path = Path(name)
    is_preset = path.suffix.lower() != ".toml"
    if is_preset:
        path = PRESETS / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(preset_names())
        raise HipaError(
            f"one-step method {name!r} does not exist. Expected a .toml file or one of: {names}."
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HipaError(f"one-step method {path} cannot be read: {first_line(error)}") from None
    if "name" in values:
        raise HipaError(f"one-step method {path}: unknown key 'name'. The file's name is its name.")
    try:
        return OneStepMethod.model_validate(
            {**values, "name": path.stem if is_preset else path.name}
        )
    except ValidationError as error:
        raise HipaError(f"one-step method {path}: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    """The first of pydantic's problems, and what to do."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"]
    if problem["type"] == "extra_forbidden":
        known = ", ".join(name for name in OneStepMethod.model_fields if name != "name")
        return f"unknown key {key!r}. Expected: {known}."
    if problem["type"] == "missing":
        return f"key {key!r} is missing. Add it."
    if key == "guidance_scale":
        return (
            f"guidance_scale = {problem['input']!r}: one call of the UNet has no guidance. "
            "Expected 0 to 1, which diffusers reads as none."
        )
    if not key:
        return f"{message.removeprefix('Value error, ')}, and not both. Correct the file."
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}. Correct the file."


def check_fits(method: OneStepMethod, config: ModelConfig) -> None:
    """Check that a method is for a model.

    A width of text context that no published family has, as of a small model of one's own, fits
    every method but those for SDXL.

    Raises:
        HipaError: it is for another family, or the UNet takes the guidance as an input.

    """
    if config.unet.get("time_cond_proj_dim"):
        raise HipaError(
            f"{config.folder}: the UNet takes the guidance as an input (time_cond_proj_dim="
            f"{config.unet['time_cond_proj_dim']}), which is not supported. Use the plain model "
            "with the method's LoRA, such as LCM-LoRA."
        )
    if method.family is None:
        return
    name, width = FAMILIES[method.family]
    known = {known_width for _, known_width in FAMILIES.values()}
    is_other = config.text_width in known or method.family == "sdxl"
    if config.text_width != width and is_other:
        others = ", ".join(other for other in preset_names() if _is_for(other, config.text_width))
        raise HipaError(
            f"one-step method {method.name} is for {name} (text context {width} wide), and "
            f"{config.folder} has {config.text_width}. Use one of: {others}."
        )


def _is_for(name: str, width: int) -> bool:
    """Whether a preset is for models whose text context has this width."""
    method = load_method(name)
    if method is None or method.family is None:
        return True
    return FAMILIES[method.family][1] == width


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

    kind = getattr(schedulers, method.scheduler or "", None)
    known = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
    if not {"beta_start", "beta_schedule", "prediction_type"} <= set(known):
        raise HipaError(
            f"one-step method {method.name}: scheduler = {method.scheduler!r} is no scheduler of "
            "DDPM's family in diffusers. Expected a class such as LCMScheduler, TCDScheduler or "
            "EulerDiscreteScheduler, or [factors] in its place."
        )
    unknown = sorted(set(method.settings) - set(known))
    if unknown:
        raise HipaError(
            f"one-step method {method.name}: {method.scheduler} has no setting {unknown[0]!r}. "
            "Remove it from [settings]."
        )
    settings = dict(method.settings)
    if method.prediction_type:
        settings["prediction_type"] = method.prediction_type
    # What diffusers does: keys that the model's file leaves out have the defaults of this class.
    stated = read_config(config.folder, "scheduler/scheduler_config.json")
    stated = {key: value for key, value in stated.items() if not key.startswith("_")}
    try:
        return kind.from_config({**stated, **config.schedule}, **settings)
    # ImportError: some schedulers need scipy or torchsde.
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise HipaError(
            f"one-step method {method.name}: {method.scheduler} cannot be made "
            f"({first_line(error)}). Correct [settings]."
        ) from None


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
    seen, from_noise = _take(method, config, ones, 0 * ones)
    _, from_output = _take(method, config, 0 * ones, ones)
    noise_scale = float(seen.mean())
    sample_factor = float(from_noise.mean()) / noise_scale
    output_factor = float(from_output.mean())

    got = _take(method, config, noise, output)[1]
    expected = sample_factor * noise_scale * noise + output_factor * output
    largest = float(expected.abs().max())
    if not torch.allclose(got, expected, rtol=0, atol=LINEAR_WITHIN * largest):
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


def _take(method: OneStepMethod, config: ModelConfig, noise: Any, output: Any) -> tuple[Any, Any]:
    """What the UNet sees, and what the step gives, as StableDiffusionPipeline computes them."""
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
    return seen, made


def _why(method: OneStepMethod, config: ModelConfig) -> str:
    """Which settings make a step nonlinear."""
    scheduler = make_scheduler(method, config)
    known = inspect.signature(type(scheduler).__init__).parameters
    clips = [key for key in ("clip_sample", "thresholding") if key in known]
    found = [f"{key} = true" for key in clips if scheduler.config.get(key)]
    return f" ({', '.join(found)})" if found else " (it may add noise: set eta = 0)"
