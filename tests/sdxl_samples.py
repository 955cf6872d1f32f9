"""The bundles of tests/tiny_sdxl.tar.xz: one of each task, of a tiny SDXL with random weights."""

from __future__ import annotations

import tarfile
from pathlib import Path

from hipa_deploy.bundle.folder import Bundle

ARCHIVE = Path(__file__).parent / "tiny_sdxl.tar.xz"
NAME = "sdxl-tiny"  # it refines
BAKED = "sdxl-tiny-baked"  # the same with a closed set of prompts


def sdxl_bundles(folder: Path) -> dict[str, Bundle]:
    """Unpack them into ``folder``; by name."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return {path.name: Bundle.open(path) for path in sorted(folder.iterdir())}


def sdxl_bundle(folder: Path) -> Bundle:
    """Unpack the one that refines into ``folder``."""
    return sdxl_bundles(folder)[NAME]
