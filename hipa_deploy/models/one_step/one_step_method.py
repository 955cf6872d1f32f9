"""One-step methods that others made: presets (the TOML files beside) and files of users.

A method is described as its authors state it: a scheduler of diffusers, a timestep, settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from hipa_deploy.disk.reading import read_toml, shown
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.record import Record

PRESETS = Path(__file__).parent
OWN = "hipa"  # the name of HiPA's own step, x0 at the last timestep: no method at all
# Width of the text context, by which a model's family is known.
FAMILIES = {"sd1": ("SD 1.x", 768), "sd2": ("SD 2.x", 1024), "sdxl": ("SDXL", 2048)}


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
        size: side of the images in pixels, where the authors' model was made for another size than
            others of its family.

    """

    name: str
    source: str = Field(min_length=1, max_length=10_000)
    note: str = ""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    needs_adaptor: bool = False
    scheduler: str | None = Field(default=None, max_length=100)
    settings: dict[str, Any] = Field(default_factory=dict)
    factors: Factors | None = None
    timestep: int = Field(ge=0, le=100_000, strict=True)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    guidance_scale: float = Field(default=0.0, ge=0, le=1)
    eta: float | None = Field(default=None, ge=0, le=1)
    size: int | None = Field(default=None, ge=8, le=65_536, strict=True)

    @model_validator(mode="after")
    def _one_source_of_numbers(self) -> OneStepMethod:
        if (self.scheduler is None) == (self.factors is None):
            raise ValueError("expected either scheduler or [factors]")
        return self


def preset_names() -> list[str]:
    """The names that ``--one-step`` knows, HiPA's own first."""
    return [OWN, *sorted(path.stem for path in PRESETS.glob("*.toml"))]


def load_method(name: str) -> OneStepMethod | None:
    """Read a preset or a file.

    Args:
        name: one of ``preset_names()``, or a .toml file. ``NAME@TIMESTEP`` starts its step at
            another timestep than its authors say.

    Returns:
        The method; None for 'hipa', HiPA's own step.

    Raises:
        HipaError: there is neither, it is not TOML, or a key or value is wrong.

    Example:
        >>> load_method("hyper-sd15").scheduler
        'TCDScheduler'
        >>> load_method("lcm-sd15@759").timestep
        759

    """
    if name == OWN:
        return None
    plain, _, timestep = name.rpartition("@")
    if plain and timestep.isdecimal() and not Path(name).is_file():
        return _at_timestep(load_method(plain), int(timestep), name)
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
        values = read_toml(path)
    except HipaError as error:
        raise HipaError(f"one-step method {error}") from None
    if "name" in values:
        raise HipaError(f"one-step method {path}: unknown key 'name'. The file's name is its name.")
    try:
        return OneStepMethod.model_validate(
            {**values, "name": path.stem if is_preset else path.name}
        )
    except ValidationError as error:
        raise HipaError(f"one-step method {path}: {_problem(error)}") from None


def _at_timestep(method: OneStepMethod | None, timestep: int, name: str) -> OneStepMethod:
    """A method whose step starts at another timestep, under the name that says so."""
    if method is None:
        raise HipaError(f"one-step method {name}: an adaptor of HiPA has its own step. Use {OWN}.")
    values = method.model_dump(exclude_unset=True)
    try:
        return OneStepMethod.model_validate({**values, "name": name, "timestep": timestep})
    except ValidationError as error:
        raise HipaError(f"one-step method {name}: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    """The first of pydantic's problems, and what to do."""
    problem = error.errors()[0]
    key = ".".join(shown(str(part)) for part in problem["loc"])
    message = str(problem["msg"])[:200]
    if problem["type"] == "extra_forbidden":
        known = ", ".join(name for name in OneStepMethod.model_fields if name != "name")
        return f"unknown key {brief(key)}. Expected: {known}."
    if problem["type"] == "missing":
        return f"key {key!r} is missing. Add it."
    if key == "guidance_scale":
        return (
            f"guidance_scale = {brief(problem['input'])}: one call of the UNet has no guidance. "
            "Expected 0 to 1, which diffusers reads as none."
        )
    if not key:
        return f"{message.removeprefix('Value error, ')}, and not both. Correct the file."
    got = brief(problem["input"])
    return f"{key} = {got}: {message[0].lower()}{message[1:]}. Correct the file."


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
    if method.family is not None and not _is_for(method, config):
        name, width = FAMILIES[method.family]
        others = ", ".join(names_for(config))
        raise HipaError(
            f"one-step method {method.name} is for {name} (text context {width} wide), and "
            f"{config.folder} has {config.text_width}. Use one of: {others}."
        )


def names_for(config: ModelConfig) -> list[str]:
    """The presets for models of this kind, HiPA's own step first."""
    names = []
    for name in preset_names():
        method = load_method(name)
        if method is None or _is_for(method, config):
            names.append(name)
    return names


def _is_for(method: OneStepMethod, config: ModelConfig) -> bool:
    if method.family is None:
        return True
    # SDXL and its relatives are known by their two text encoders, whatever the widths.
    if config.has_text_pair or method.family == "sdxl":
        return config.has_text_pair and method.family == "sdxl"
    known = {width for _, width in FAMILIES.values()}
    return config.text_width not in known or FAMILIES[method.family][1] == config.text_width
