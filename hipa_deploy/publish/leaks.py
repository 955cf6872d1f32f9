"""Look for paths of this machine in what is about to be published."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hipa_deploy.disk.reading import read_json
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA
from hipa_deploy.publish.measured_quality import NUMBERS

# Folders of users, on Linux, macOS and Windows. The six bytes of '/home/' are not met by chance
# even in gigabytes of weights.
_USER_FOLDER = re.compile(
    rb"/(?:home|Users|root|mnt|media)/[\w.\x80-\xff-]+/[\w./\x80-\xff-]+"
    rb"|[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\{1,2}[\w.\\ -]+"
)
CARD = "README.md"
# Records of what a user gave: each of their texts that is a whole path is one of a machine.
_RECORDS = (METADATA, NUMBERS)
_AT_ONCE = 1 << 26  # bytes of a file
_OVERLAP = 4096  # bytes that two pieces of a file share: longer than a path
_SHORTEST = 6  # characters of a folder that is looked for: '/tmp' may stand anywhere


def refuse_local_paths(folder: Path, own: Iterable[Path]) -> None:
    """Check that no file below ``folder`` names a folder of this machine.

    Args:
        folder: what is to be published.
        own: folders of this machine that must not be named; the user's home is always one.

    Raises:
        HipaError: a file does; the message has the file and the path.

    """
    needles = []
    for path in (Path.home(), Path.cwd(), *own):
        text = str(path.absolute())
        if len(text) >= _SHORTEST:
            needles.append(re.escape(text.encode()) + rb"[\w./-]*")
    pattern = re.compile(b"|".join([_USER_FOLDER.pattern, *needles]))
    # The card repeats what other files say, so it comes last: the message names where to mend.
    for path in sorted(folder.rglob("*"), key=lambda path: (path.name == CARD, path)):
        found = _find(path, pattern) if path.is_file() else None
        if found is None and path.name in _RECORDS:
            found = _absolute_path(read_json(path))
        if found is not None:
            name = path.relative_to(folder).as_posix()
            raise HipaError(
                f"{name} names the path {found[:200]} of a machine, which would be published. "
                "Replace it there by a name without folders, and publish again."
            )


def _find(path: Path, pattern: re.Pattern[bytes]) -> str | None:
    """The first match in a file, which is read piece by piece."""
    end = b""
    with path.open("rb") as file:
        while piece := file.read(_AT_ONCE):
            found = pattern.search(end + piece)
            if found:
                return found.group().decode(errors="replace")
            end = piece[-_OVERLAP:]
    return None


def _absolute_path(value: Any) -> str | None:
    """The first text in a value of JSON that is an absolute path, of this system or another."""
    if isinstance(value, str):
        is_path = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
        return value if is_path else None
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list):
        parts = value
    for part in parts:
        found = _absolute_path(part)
        if found is not None:
            return found
    return None
