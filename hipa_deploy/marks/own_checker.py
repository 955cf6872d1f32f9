"""A checker of images that an option names as 'module:function'. Its module is imported here."""

from __future__ import annotations

import importlib
import inspect
from contextlib import suppress
from typing import Any

from hipa_deploy.errors import HipaError, brief
from hipa_deploy.marks.safety import Checker
from hipa_deploy.user_code import check_allowed, code_allowed, user_errors

_EXPECTED = "Expected MODULE:FUNCTION on Python's path (PYTHONPATH=. adds this folder)."


def chosen_checker(name: str | None, allow_code: bool) -> Checker | None:
    """The checker of the options ``--checker`` and ``--allow-code``; None without a name.

    Args:
        name: 'module:function'.
        allow_code: whether the module may be imported.

    Raises:
        HipaError: as ``import_checker``.

    Example:
        >>> checker = chosen_checker("my_filters:too_dark", allow_code=True)

    """
    if name is None:
        return None
    with code_allowed(allow_code):
        return import_checker(name)


def check_checker_name(name: str) -> None:
    """Refuse a name before its module is imported.

    Args:
        name: 'module:function'.

    Raises:
        HipaError: it has another form, or code is not allowed.

    """
    module, _, function = name.partition(":")
    parts = (*module.split("."), function)
    if not all(part.isidentifier() for part in parts):
        raise HipaError(f"--checker is {brief(name)}. Expected MODULE:FUNCTION.")
    check_allowed("--checker", name, named_by_recipe=False)


def import_checker(name: str) -> Checker:
    """Import a checker. It is called with images alone, and its answers are checked then.

    Args:
        name: 'module:function'.

    Raises:
        HipaError: code is not allowed, the module cannot be imported, or what it has under this
            name is no function of one argument.

    Example:
        >>> with code_allowed():
        ...     checker = import_checker("my_filters:too_dark")

    """
    check_checker_name(name)
    module, _, function = name.partition(":")
    with user_errors(f"--checker {name} cannot be imported", _EXPECTED):
        found = getattr(importlib.import_module(module), function)
    if not callable(found) or not _takes_one_argument(found):
        raise HipaError(
            f"--checker {name} is {brief(found)}. Expected a function of one argument: images, "
            "uint8 [B, H, W, 3]."
        )
    checker: Checker = found
    return checker


def _takes_one_argument(function: Any) -> bool:
    # Of some functions in C the arguments are not known; those are taken as they are.
    with suppress(ValueError):
        signature = inspect.signature(function)
        try:
            signature.bind(None)
        except TypeError:
            return False
    return True
