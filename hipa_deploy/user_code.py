"""Code that a file or an option names as 'module:function'. It runs only where that is allowed.

A recipe or a command line may come from a stranger, and to import a module is to run it. So a name
is looked up only inside ``code_allowed``, which ``--allow-code`` opens.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.interrupts import raise_interruption

_ALLOWED: ContextVar[bool] = ContextVar("code_allowed", default=False)


@contextmanager
def code_allowed(allowed: bool = True) -> Iterator[None]:
    """Inside it, code that a recipe or an option names may run.

    Args:
        allowed: False changes nothing, so that an option can be passed on as it is.

    Example:
        >>> with code_allowed():
        ...     train_adaptor(recipe, model, Path("adaptor"))

    """
    token = _ALLOWED.set(allowed or _ALLOWED.get())
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def check_allowed(what: str, name: str, *, named_by_recipe: bool = True) -> None:
    """Refuse a name of code, before any slow work, unless code is allowed.

    Args:
        what: what the code is, such as 'backbone'.
        name: 'module:function'; a name without a colon is none of code, and is not refused.
        named_by_recipe: whether a recipe names it; otherwise an option does.

    Raises:
        HipaError: it is not allowed; the message says which module would run.

    """
    if ":" not in name or _ALLOWED.get():
        return
    module = name.partition(":")[0]
    whose = (
        ", which the recipe names. If you trust both" if named_by_recipe else ". If you trust it"
    )
    raise HipaError(
        f"{what} {name} runs code of the module {module}{whose}, pass --allow-code "
        "(in Python: with code_allowed())."
    )


def call_user_function(what: str, name: str) -> Any:
    """Import 'module:function' and call the function without arguments.

    Args:
        what: what the code is, for messages.
        name: 'module:function'.

    Raises:
        HipaError: it is not allowed, or it fails in any way; SystemExit is one, which would
            otherwise end the command as if all were well.

    """
    check_allowed(what, name)
    module, _, function = name.partition(":")
    with user_errors(f"{what} {name} cannot be made", "Expected a function of no arguments."):
        return getattr(importlib.import_module(module), function)()


@contextmanager
def user_errors(what: str, expected: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one line; Ctrl-C stays Ctrl-C.

    Args:
        what: what failed, the beginning of the message.
        expected: what should have been, its end.

    Raises:
        HipaError: the code raised.

    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise_interruption()
        raise HipaError(
            f"{what} ({type(error).__name__}: {first_line(error)}). {expected}"
        ) from None
