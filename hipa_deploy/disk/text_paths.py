"""Paths that a caller gave as text, where a field is a ``Path``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError

_TYPES = ("Path", "Path | None")


def take_text_paths(options: Any) -> None:
    """Make a ``Path`` of every text in a field of that type; for ``__post_init__``.

    Args:
        options: of a frozen dataclass whose module has ``from __future__ import annotations``.

    Raises:
        HipaError: a text is empty.
        TypeError: a field has neither a path, nor text, nor None where that is allowed.

    """
    for field in fields(options):
        value = getattr(options, field.name)
        if field.type in _TYPES and not (value is None and "None" in field.type):
            # Path("") is the current folder, which nobody means.
            if value == "":
                raise HipaError(f"{field.name} is empty. Expected a path, or nothing.")
            object.__setattr__(options, field.name, Path(value))
