"""What the package carries: the miniature base model, its HiPA adaptor, and a ready one-step bundle.

``model/`` is a StableDiffusionPipeline folder, ``adaptor/`` loads with ``load_lora_weights``, ``decoder/`` is an
AutoencoderTiny folder for the same latents, ``bundle/`` opens with ``OneStepPipeline.load``.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
MODEL = ROOT / "model"
ADAPTOR = ROOT / "adaptor"
DECODER = ROOT / "decoder"
BUNDLE = ROOT / "bundle"

NAME = "emoji"


def resolve_adaptor(name: str) -> Path:
    """'emoji' is the embedded adaptor, unless a folder of that name is here; anything else is a folder."""
    return _resolve(name, ADAPTOR)


def resolve_bundle(name: str | Path) -> Path:
    """'emoji' is the embedded bundle, unless a folder of that name is here; anything else is a folder."""
    return _resolve(name, BUNDLE)


def _resolve(name: str | Path, embedded: Path) -> Path:
    path = Path(name)
    return embedded if str(name) == NAME and not path.exists() else path
