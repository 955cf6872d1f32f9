"""A checkpoint as it is read: every value is checked before the run takes any of it.

``state.pt`` may be damaged, or of another program. A step beyond the recipe's would look like a
training that is complete, and a tensor of another shape would stop it half loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hipa_deploy.disk.reading import MIB, parse_json
from hipa_deploy.errors import HipaError, brief, first_line
from hipa_deploy.models.weights.pickled import load_pickled

KEYS = ("weights", "optimizer", "average", "scaler", "step", "identity")
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_BESIDE = 64 * MIB  # of a file, beside its tensors
_COPIES = 8  # of the weights in a checkpoint: two moments and an average beside them


def read_checkpoint(path: Path, weights: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
    """The content of ``state.pt``, its parts of the right types; 'identity' is parsed.

    Args:
        path: of the file.
        weights: that the run stores, by name.
        steps: of the run.

    Raises:
        HipaError: it is damaged, larger than a checkpoint of these weights can be, or of a later
            step than the last.

    """
    expected = sum(weight.numel() * weight.element_size() for weight in weights.values())
    state = load_pickled(path, max_bytes=expected * _COPIES + _BESIDE)
    if not isinstance(state, dict):
        raise damaged(path, "it holds no table")
    for key in KEYS:
        if key not in state:
            raise damaged(path, f"it has no {key}")
    for key in ("weights", "optimizer", "average", "scaler"):
        if not isinstance(state[key], dict):
            raise damaged(path, f"its {key} is no table")

    step = state["step"]
    if type(step) is not int or step < 0:
        raise damaged(path, f"its step is {brief(step)}, expected 0 or more")
    try:
        identity = parse_json(state["identity"]) if isinstance(state["identity"], str) else None
    except ValueError as error:
        raise damaged(path, f"its identity cannot be read: {first_line(error)}") from None
    if not isinstance(identity, dict) or not isinstance(identity.get("recipe"), dict):
        raise damaged(path, "its identity holds no recipe")

    # A run that goes on to fewer steps than it was started for is one; a checkpoint beyond the end
    # of its own run is none.
    last = identity["recipe"].get("steps")
    if type(last) is not int or step > last:
        raise damaged(path, f"its step is {step}, and its run has {brief(last)}")
    if step > steps:
        raise HipaError(
            f"run folder {path.parent} has taken {step} steps already, and {steps} were asked for. "
            "Ask for more steps, or choose another output folder."
        )
    return {**state, "identity": identity}


def check_tensors(
    path: Path, what: str, stored: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> None:
    """Check that a table holds a finite tensor of the right shape for each of ``expected``.

    Raises:
        HipaError: it lacks one, or one is of another shape or not finite.

    """
    for name, weight in expected.items():
        check_tensor(path, f"{what} {name}", stored.get(name), weight.shape)


def optimizer_state(
    path: Path, stored: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state of AdamW in a checkpoint, for ``load_state_dict``: the moments of each weight.

    The settings of the groups are this run's own: the recipe decides them.

    Raises:
        HipaError: it is for other weights, or a moment is missing or of another shape.

    """
    groups = optimizer.state_dict()["param_groups"]
    stored_groups = stored.get("param_groups")
    state = stored.get("state")
    if not isinstance(stored_groups, list) or not isinstance(state, dict):
        raise damaged(path, "its optimiser has no moments")
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, moments in state.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise damaged(path, f"its optimiser has no weight {brief(number)}")
        if not isinstance(moments, dict) or set(moments) != {"step", *MOMENTS}:
            raise damaged(path, f"its optimiser has other moments of weight {number}")
        shape = parameters[number].shape
        for name in MOMENTS:
            check_tensor(path, f"optimiser's {name}", moments[name], shape)
        check_tensor(path, "optimiser's step", moments["step"], torch.Size([]))
        if not 0 <= float(moments["step"]) <= 1e9:
            raise damaged(path, f"its optimiser has step {float(moments['step']):g}")
    return {"state": state, "param_groups": groups}


def check_tensor(path: Path, what: str, value: Any, shape: torch.Size) -> None:
    """Raise HipaError unless ``value`` is a tensor of that shape with finite numbers."""
    if not isinstance(value, Tensor):
        raise damaged(path, f"its {what} is missing")
    if value.shape != shape or not value.is_floating_point():
        got = f"{list(value.shape)} {value.dtype}"
        raise damaged(path, f"its {what} is {got}, expected {list(shape)} numbers")
    if not torch.isfinite(value).all():
        raise damaged(path, f"its {what} is not finite")


def damaged(path: Path, why: str) -> HipaError:
    """The error for a checkpoint that cannot be used."""
    return HipaError(
        f"checkpoint {path} is damaged: {why}. Remove {path.parent}, or choose another "
        "output folder."
    )
