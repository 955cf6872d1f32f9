"""Which modules each extra brings, and one check before anything imports them."""

from __future__ import annotations

from importlib.util import find_spec

from hipa_deploy.errors import MissingDependencyError

EXTRAS = {
    "train": (
        "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tensorboard",
        "torchmetrics",
    ),
    "export": ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript"),
}  # fmt: skip


def missing(extra: str) -> list[str]:
    """The modules of ``extra`` that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def require(*extras: str) -> None:
    """Check that every module of these extras is installed.

    Raises:
        MissingDependencyError: one is not; the message names the pip command.

    """
    for extra in extras:
        if absent := missing(extra):
            raise MissingDependencyError(absent[0], extra)
