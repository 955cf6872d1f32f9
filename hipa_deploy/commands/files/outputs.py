"""What a command may write: never over an input, and over an existing file only if asked to.

Files are compared as the system sees them: through links, hard links and, where the disk takes them
for the same, names in another case.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from hipa_deploy.disk.files import check_writable, is_special, write_file
from hipa_deploy.errors import HipaError, HipaWarning

FORCE = "Add --force to replace it, or choose another name."


def check_outputs(
    outputs: Iterable[Path],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    remedy: str = FORCE,
) -> None:
    """Check that files may be written, before the work that makes them.

    Args:
        outputs: the files to write.
        inputs: files and folders that are read; they are never written over, not even with
            ``force``. Those that do not exist are passed over.
        force: existing files that are no inputs may be replaced.
        remedy: what a user can do about a file that exists.

    Raises:
        HipaError: an output is an input, or a file in a folder that is an input; it exists and
            ``force`` is False; it is a folder; two outputs are the same file; or an output cannot
            be written.

    Example:
        >>> check_outputs([Path("large.png")], inputs=[Path("small.png")])

    """
    inputs = list(inputs)
    seen: set[str] = set()
    for out in outputs:
        real = os.path.realpath(out)
        if out.is_dir():
            raise HipaError(f"{out} is a folder. Give the name of a file.")
        if out.exists() and is_special(out):  # such as /dev/stdout
            continue
        if real in seen:
            raise HipaError(f"{out} is given for two outputs. Give each a name of its own.")
        seen.add(real)

        for source in inputs:
            if _is_input(out, source):
                raise HipaError(
                    f"{out} is the input {source}, which is never written over. "
                    "Choose another name for the output."
                )
        if out.exists() and not force:
            raise HipaError(f"{out} exists. {remedy}")
        check_writable(out)


def _is_input(out: Path, source: Path) -> bool:
    """Whether ``out`` is the file ``source``, or an existing file in the folder ``source``."""
    if not out.exists() or not source.exists():
        return False
    if source.is_dir():
        return Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source))
    return out.samefile(source)


def next_free_name(path: Path) -> Path:
    """``path`` if nothing is there, else the first free one of name-2, name-3 and so on.

    Example:
        >>> next_free_name(Path("image.png"))  # image.png and image-2.png exist
        PosixPath('image-3.png')

    """
    if not os.path.lexists(path):
        return path
    for number in count(2):
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not os.path.lexists(free):
            return free
    raise AssertionError  # count has no end


def write_output(path: Path, content: bytes, *, force: bool = False) -> Path:
    """Write a result that took a while to make; it is never lost to a name that is taken.

    Args:
        path: the file. ``check_outputs`` has allowed it.
        content: what it will hold.
        force: a file that exists is replaced. Otherwise, where one has appeared since the check,
            the next free name is taken and a warning says so.

    Returns:
        The file that was written.

    Raises:
        OSError: the file cannot be written.

    """
    written = path
    while True:
        try:
            write_file(written, content, replace=force)
            break
        except FileExistsError:
            written = next_free_name(path)
    if written != path:
        warnings.warn(
            f"{path} was written by another process meanwhile: the result is in {written}.",
            HipaWarning,
            stacklevel=2,
        )
    return written
