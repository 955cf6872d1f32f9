"""Which modules each extra brings, and one check before anything imports them."""

from __future__ import annotations

from importlib.util import find_spec

from hipa_deploy.errors import MissingDependencyError

EXTRAS = {
    "train": (
        "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tensorboard", "torchmetrics",
    ),
    "export": ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript"),
}  # fmt: skip


def missing(extra: str) -> list[str]:
    """The modules of ``extra`` that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def require(*extras: str) -> None:
    """Raise MissingDependencyError, which names the pip command, unless every module of the extras is installed."""
    for extra in extras:
        if absent := missing(extra):
            raise MissingDependencyError(absent[0], extra)
