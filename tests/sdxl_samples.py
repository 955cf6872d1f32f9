"""The bundles of tests/tiny_sdxl.zip: one of each task, of a tiny SDXL with random weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hipa_deploy.bundle.folder import Bundle

ARCHIVE = Path(__file__).parent / "tiny_sdxl.zip"
NAME = "sdxl-tiny"  # it refines, and has an adaptor to swap in
ADAPTOR = "half"


def sdxl_bundles(folder: Path) -> dict[str, Bundle]:
    """Unpack them into ``folder``; by name."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return {path.name: Bundle.open(path) for path in sorted(folder.iterdir())}


def sdxl_bundle(folder: Path) -> Bundle:
    """Unpack the one to generate into ``folder``."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.startswith(f"{NAME}/")])
    return Bundle.open(folder / NAME)
