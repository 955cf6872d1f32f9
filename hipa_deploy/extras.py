"""The modules that each extra installs, and one check before anything imports them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from hipa_deploy.errors import HipaError, MissingDependencyError

EXTRAS = {
    "train": (
        "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tensorboard",
        "torchmetrics",
    ),
    "export": ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript"),
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "ray": ("ray",),
}  # fmt: skip
# The first major version that nobody has tried. pip keeps below it, other installers may not: with
# other names in the text encoder, LoRAs and embeddings could miss their places.
_TOO_NEW = {"transformers": 6}


def missing(extra: str) -> list[str]:
    """Return the modules of ``extra`` that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def too_new(extra: str) -> list[str]:
    """Say which packages of ``extra`` are too new, a sentence each; none that are missing."""
    found = []
    for package, major in _TOO_NEW.items():
        if package not in EXTRAS[extra] or find_spec(package) is None:
            continue
        try:
            installed = version(package)
        except PackageNotFoundError:  # a checkout on PYTHONPATH: nobody knows its version
            continue
        if int(installed.partition(".")[0]) >= major:
            found.append(
                f"{package} {installed} is installed. Expected a version below {major}. "
                f"Run: pip install 'hipa-deploy[{extra}]'"
            )
    return found


def require(*extras: str) -> None:
    """Check that every module of some extras is installed, in a version that works.

    Raises:
        MissingDependencyError: one is not; the message holds the pip command.
        HipaError: one is too new; the same.

    """
    for extra in extras:
        absent = missing(extra)
        if absent:
            raise MissingDependencyError(absent[0], extra)
        for problem in too_new(extra):
            raise HipaError(problem)
