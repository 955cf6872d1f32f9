"""The bundle of tests/tiny_refine.zip, which has the base UNet beside the one-step one."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hipa_deploy.bundle.folder import Bundle

ARCHIVE = Path(__file__).parent / "tiny_refine.zip"
STEPS = 7  # of its adaptor's teacher
GUIDANCE = 3.5
SAMPLER = "ddim"


def refine_bundle(folder: Path) -> Bundle:
    """Unpack it into ``folder``."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return Bundle.open(folder / "tiny-refine")
