"""hipa-deploy: one-step text-to-image on NVIDIA GPUs and Jetson.

>>> from hipa_deploy import OneStepPipeline
>>> OneStepPipeline.load("emoji")("3d emoji of a red apple", seed=0).images[0].save("apple.png")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hipa_deploy.errors import HipaError
from hipa_deploy.old_names import install

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.generate.pipeline import OneStepPipeline

# ONNX Runtime 1.29 and newer reports its sessions to Microsoft unless this is set before it loads
# (microsoft/onnxruntime#27379). Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
install()
__version__ = "0.1.0"
__all__ = ["Bundle", "HipaError", "OneStepPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import numpy and ONNX Runtime only when they are used: ``hipa --help`` needs neither."""
    if name == "OneStepPipeline":
        from hipa_deploy.generate.pipeline import OneStepPipeline

        return OneStepPipeline
    if name == "Bundle":
        from hipa_deploy.bundle.folder import Bundle

        return Bundle
    raise AttributeError(f"module 'hipa_deploy' has no attribute {name!r}")
