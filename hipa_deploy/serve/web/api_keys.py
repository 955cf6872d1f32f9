"""API keys, from a file and from the environment."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from hipa_deploy.disk.reading import MIB, read_text
from hipa_deploy.errors import HipaError

VARIABLE = "HIPA_API_KEYS"
_SHORTEST = 16  # characters; `openssl rand -hex 16` gives 32


def read_keys(path: Path | None) -> list[str]:
    """The keys of a file, one a line, and those of the variable, with commas between.

    Empty lines and lines that begin with ``#`` are left out.

    Args:
        path: the file; None reads the variable alone.

    Raises:
        HipaError: the file cannot be read; the file, or the variable where it is set, has no key;
            or a key is too short or no plain text.

    """
    of_variable = os.environ.get(VARIABLE)
    keys = [key.strip() for key in (of_variable or "").split(",") if key.strip()]
    # A secret that did not arrive must not open the service to everybody.
    if of_variable is not None and not keys:
        raise HipaError(
            f"the variable {VARIABLE} is set, and has no API key. Write one key or several, with "
            "commas between; or unset it."
        )
    if path is not None:
        remedy = "Expected a file with API keys, one a line."
        text = read_text(path, max_bytes=MIB, remedy=remedy)
        lines = [line.strip() for line in text.splitlines()]
        of_file = [line for line in lines if line and not line.startswith("#")]
        if not of_file:
            raise HipaError(f"{path} has no API key. Write one a line.")
        keys += of_file
    for key in keys:
        # The key itself stays out of the message: it may be right but for a blank.
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise HipaError(
                f"an API key has {len(key)} characters or some that are not plain text. Expected "
                f"{_SHORTEST} or more ASCII characters without blanks, such as openssl rand -hex "
                "16 gives."
            )
    return keys


class ApiKeys:
    """The keys of a service, compared in constant time.

    Args:
        keys: one of them is needed; none: no key is.

    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def fit(self, authorization: str) -> bool:
        """Whether somebody may come in.

        Args:
            authorization: the value of the header of this name; empty without it.

        """
        if not self._digests:
            return True
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip() if scheme.lower() == "bearer" else "")
        # Every key is compared, whatever the first ones gave: the time says nothing.
        found = False
        for key in self._digests:
            found |= hmac.compare_digest(digest, key)
        return found


def _digest(key: str) -> bytes:
    """Equal lengths, so that a comparison does not tell the length of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
