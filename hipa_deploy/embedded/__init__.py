"""What the package carries: a miniature base model, its HiPA adaptors, and a one-step bundle.

``model/`` is a StableDiffusionPipeline folder, ``adaptor/`` loads with ``load_lora_weights``, as
``adaptor-edit/``, ``adaptor-inpaint/`` and ``adaptor-upscale/`` do; ``decoder/`` is an
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
EXAMPLE_PROMPT = "3d emoji of a red apple"  # of the form that the model was trained on
ADAPTORS = {
    NAME: ADAPTOR,
    **{f"{NAME}-{task}": ROOT / f"adaptor-{task}" for task in ("edit", "inpaint", "upscale")},
}


def resolve_adaptor(name: str) -> Path:
    """The adaptor folder that ``name`` means.

    'emoji' and 'emoji-TASK' are embedded, unless a folder of that name is here. Any other name is
    a folder's.
    """
    path = Path(name)
    return ADAPTORS[name] if name in ADAPTORS and not path.exists() else path


def resolve_bundle(name: str | Path) -> Path:
    """The bundle folder that ``name`` means.

    'emoji' is the embedded bundle, unless a folder of that name is here. Any other name is a
    folder's.
    """
    path = Path(name)
    return BUNDLE if str(name) == NAME and not path.exists() else path
