"""What the package carries: the miniature base model, its HiPA adaptor, and a ready one-step bundle.

``model/`` is a StableDiffusionPipeline folder, ``adaptor/`` loads with ``load_lora_weights``, ``bundle/``
opens with ``OneStepPipeline.load``.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
MODEL = ROOT / "model"
ADAPTOR = ROOT / "adaptor"
BUNDLE = ROOT / "bundle"

NAME = "emoji"


def resolve_model(name: str) -> Path | str:
    """'emoji' is the embedded model; anything else is a folder or a hub id, returned as it is."""
    return MODEL if name == NAME else name


def resolve_adaptor(name: str) -> Path:
    """'emoji' is the embedded adaptor; anything else is a folder."""
    return ADAPTOR if name == NAME else Path(name)


def resolve_bundle(name: str | Path) -> Path:
    """'emoji' is the embedded bundle, unless a folder of that name is here; anything else is a folder."""
    path = Path(name)
    return BUNDLE if str(name) == NAME and not path.exists() else path
