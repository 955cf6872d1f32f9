"""A user's own loss, by the name 'module:function' that a recipe gives.

``function()`` is called once and returns the loss: a callable of the student's images and their
targets. It is code, and runs only inside ``hipa_deploy.user_code.code_allowed``.

Shape suffixes: B batch, H W image height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hipa_deploy.errors import HipaError
from hipa_deploy.user_code import call_user_function, user_errors

EXPECTED = (
    "Expected a callable: two float32 tensors [B, 3, H, W], the student's images and their "
    "targets, in [0, 1] -> a scalar with a gradient for the first."
)
PROBE_SIZE = 64  # pixels, of the images that it is tried on


class CustomLoss(nn.Module):
    """A user's loss as a module without trainable weights.

    Args:
        name: 'module:function', for messages.
        function: The loss.

    """

    def __init__(self, name: str, function: Any) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.eval().requires_grad_(False)

    def forward(self, image01_BCHW: Tensor, target01_BCHW: Tensor) -> Tensor:
        """The loss, a scalar."""
        loss: Tensor = self.function(image01_BCHW, target01_BCHW)
        return loss


def load_custom_loss(name: str) -> CustomLoss:
    """The loss that a recipe names, tried on two small random images.

    Args:
        name: 'module:function'.

    Raises:
        HipaError: code was not allowed, the function fails, or what it returns is not a loss: it
            fails on the images, or gives anything but a finite scalar with a gradient.

    Example:
        >>> with code_allowed():
        ...     loss = load_custom_loss("my_losses:charbonnier")

    """
    function = call_user_function("loss", name)
    if not callable(function):
        raise HipaError(f"loss {name} is {type(function).__name__}. {EXPECTED}")
    loss = CustomLoss(name, function)
    _check(loss)
    return loss


def _check(loss: CustomLoss) -> None:
    """Raise HipaError unless the loss of two images is a finite scalar with a gradient."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, PROBE_SIZE, PROBE_SIZE, generator=generator).requires_grad_()
    target = torch.rand(2, 3, PROBE_SIZE, PROBE_SIZE, generator=generator)
    what = f"loss {loss.name}"
    with user_errors(f"{what} fails on two images", EXPECTED):
        value = loss(image, target)
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = f"a tensor {list(value.shape)}"
        raise HipaError(f"{what} gives {got}. {EXPECTED}")
    if not torch.isfinite(value):
        got = f"{float(value.detach()):g}"
        raise HipaError(f"{what} is {got} on two images, not finite. {EXPECTED}")
    gradient = gradient_of(value, image, what, EXPECTED)
    if gradient is None:
        raise HipaError(f"{what} has no gradient for the student's images. {EXPECTED}")
    if not torch.isfinite(gradient).all():
        raise HipaError(f"{what} has a gradient that is not finite. {EXPECTED}")


def gradient_of(value: Tensor, image: Tensor, what: str, expected: str) -> Tensor | None:
    """The gradient, for images, of what a user's code computed of them; None where it has none.

    Args:
        value: A scalar.
        image: It requires a gradient.
        what: What the code is, for messages.
        expected: What it should be, for messages.

    Raises:
        HipaError: the code fails in its backward pass.

    """
    if not value.requires_grad:
        return None
    with user_errors(f"{what} fails in its gradient", expected):
        (gradient,) = torch.autograd.grad(value, image, allow_unused=True)
    return gradient if gradient is not None and gradient.any() else None
