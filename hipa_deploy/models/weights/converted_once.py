"""A part of a model in one file, converted into the user's cache: once for each content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from hipa_deploy.disk.files import check_space, user_cache
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError

CONFIG = "config.json"


def converted_once(
    kind: str,
    file: Path,
    config: Mapping[str, Any],
    least_bytes: int,
    convert: Callable[[Path], None],
) -> Path:
    """Return the diffusers folder of a file, converted now or earlier.

    Args:
        kind: folder of the cache, such as 'vaes'.
        file: what is converted.
        config: what the result depends on beside the file's content.
        least_bytes: that the folder takes.
        convert: writes the folder that it is given, whole or not at all.

    Raises:
        HipaError: there is too little space, or as ``convert``.

    """
    key = {"format": 1, "file": file_sha256(file), "config": config}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    out = user_cache() / kind / digest[:24] / file.stem
    if not (out / CONFIG).is_file():
        check_space(out, least_bytes)
        with Console(stderr=True).status(f"reading {escape(file.name)}"):
            try:
                convert(out)
            except (HipaError, OSError):
                # Another process may have converted the same file meanwhile. Its result is equal.
                if not (out / CONFIG).is_file():
                    raise
    return out
