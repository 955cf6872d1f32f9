"""Names of repositories in the Hugging Face hub's cache.

The layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

from pathlib import Path

HUB_PREFIX = "models--"  # of a repository's folder


def repository_name(folder: Path) -> str | None:
    """Return the repository that a folder in the hub's cache is of; None for any other folder.

    A snapshot's own name is the hash of a commit.

    Example:
        >>> repository_name(Path("/cache/models--owner--name/snapshots/0123"))
        'owner/name'

    """
    for parent in (folder, *folder.absolute().parents):
        if parent.name.startswith(HUB_PREFIX):
            return parent.name.removeprefix(HUB_PREFIX).replace("--", "/", 1)
    return None
