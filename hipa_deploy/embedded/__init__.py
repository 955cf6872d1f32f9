"""What the package carries: the miniature base model, its HiPA adaptors, and a one-step bundle.

- ``model/`` is a StableDiffusionPipeline folder.
- ``adaptor/``, ``adaptor-edit/``, ``adaptor-inpaint/`` and ``adaptor-upscale/`` load with
  ``load_lora_weights``.
- ``decoder/`` is an AutoencoderTiny folder for the same latents.
- ``bundle/`` opens with ``OneStepPipeline.load``.

May import nothing of the project.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent
MODEL = ROOT / "model"
ADAPTOR = ROOT / "adaptor"
DECODER = ROOT / "decoder"
BUNDLE = ROOT / "bundle"

NAME = "emoji"
EXAMPLE_PROMPT = "3d emoji of a red apple"  # of the form that the model was trained on
IMAGE_ENDINGS = (".png", ".webp", ".jpg", ".jpeg")
ADAPTORS = {
    NAME: ADAPTOR,
    f"{NAME}-edit": ROOT / "adaptor-edit",
    f"{NAME}-inpaint": ROOT / "adaptor-inpaint",
    f"{NAME}-upscale": ROOT / "adaptor-upscale",
}


def resolve_adaptor(name: str) -> Path:
    """Return an adaptor's folder: an embedded one for 'emoji' and 'emoji-TASK', else ``name``.

    A folder of the user that is named so goes before the embedded one (``hides_embedded``).
    """
    path = Path(name)
    if name in ADAPTORS and not hides_embedded(path):
        return ADAPTORS[name]
    return path


def resolve_bundle(name: str | Path) -> Path:
    """Return a bundle's folder: the embedded one for 'emoji', else ``name``.

    A folder of the user that is named so goes before the embedded one (``hides_embedded``).
    """
    path = Path(name)
    if str(name) == NAME and not hides_embedded(path):
        return BUNDLE
    return path


def hides_embedded(path: Path) -> bool:
    """Whether a user's own file or folder goes before what is embedded under the same name.

    A folder that holds images and nothing else does not: ``hipa-generate emoji --out emoji`` makes
    one, and 'emoji' must mean the same after it.
    """
    if not path.is_dir():
        return path.exists()
    try:
        names = os.listdir(path)  # noqa: PTH208
    except OSError:  # whoever opens it says why
        return True
    only_images = all(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    return not names or not only_images


def bundle_name(bundle: str | Path) -> str:
    """Return what users call a bundle: the last part of the path that was given, or 'emoji'.

    Of a link it is the link's own name: 'prod' stays 'prod', whichever bundle it leads to.

    Example:
        >>> bundle_name("emoji"), bundle_name("bundles/prod/")
        ('emoji', 'prod')

    """
    if resolve_bundle(bundle) != Path(bundle):
        return str(bundle)
    # Of '.' and '..' it is the folder's name. ``resolve`` would follow links.
    return os.path.basename(os.path.abspath(bundle))  # noqa: PTH100, PTH119
