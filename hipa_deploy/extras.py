"""The modules that each extra installs, and one check before anything imports them."""

from __future__ import annotations

from importlib.util import find_spec

from hipa_deploy.errors import MissingDependencyError

EXTRAS = {
    "train": (
        "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tensorboard",
        "torchmetrics",
    ),
    "export": ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript"),
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "ray": ("ray",),
}  # fmt: skip


def missing(extra: str) -> list[str]:
    """Return the modules of ``extra`` that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def require(*extras: str) -> None:
    """Check that every module of some extras is installed.

    Raises:
        MissingDependencyError: one is not; the message holds the pip command.

    """
    for extra in extras:
        absent = missing(extra)
        if absent:
            raise MissingDependencyError(absent[0], extra)
