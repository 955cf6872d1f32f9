"""A file that torch has pickled, read without running anything of it, and within bounds.

``torch.load(weights_only=True)`` builds tensors and plain containers alone. It believes the sizes
in the file, however: a tensor may claim a million times the values that the file holds.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.reading import MIB, check_file
from hipa_deploy.errors import HipaError, as_line, first_line
from hipa_deploy.interrupts import raise_interruption

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLED = 65_536 * MIB  # bytes; the largest checkpoints of SD 1.x and 2.x have 8 GB
_MAX_VALUES = 1_000_000  # containers and values in the file, together
_MAX_DEPTH = 50
_SHARED = 8  # tensors may share memory, as an embedding and the layer that is tied to it do
# Modules whose classes a checkpoint may name: they are not imported.
_TRAINING_TOOLS = ("pytorch_lightning.", "lightning.")
# Of numpy, what the numbers and arrays of a training's state are made with: not called either.
_NUMPY = (
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)
_SAFE = "Copy it again, or use a .safetensors file."
# A clone of a repository without Git LFS has this text in place of each large file.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What a site sends in place of a file that it does not give without a login.
_PAGES = (b"<!doctype", b"<html", b'{"error', b'{"message')


def check_stored(path: Path, max_bytes: int, remedy: str) -> None:
    """Check that a file of weights is a regular one, within a size, and stored here at all.

    Args:
        path: of the file.
        max_bytes: a larger file is refused.
        remedy: what a user may do, a sentence.

    Raises:
        HipaError: it is not, or is Git LFS's stand-in for a file that was not fetched, or a page
            that a site sent in place of the file.

    """
    check_file(path, max_bytes, remedy)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise HipaError(f"{path} cannot be read: {first_line(error)}") from None
    if start.startswith(_LFS_POINTER):
        raise HipaError(
            f"{path} is a Git LFS pointer, not the weights. Run in that folder: git lfs pull"
        )
    if start.lstrip().lower().startswith(_PAGES):
        raise HipaError(
            f"{path} is a site's page or error, not the weights. Download the file again, with a "
            "login or a token where the site wants one."
        )


def load_pickled(
    path: Path, *, allowed: Sequence[Any] = (), mapped: bool = False, max_bytes: int = MAX_PICKLED
) -> Any:
    """What a file of ``torch.save`` holds, its tensors on the CPU.

    Args:
        path: of the file.
        allowed: further classes that it may hold.
        mapped: values are read from the disk when they are used, where the format allows that.
        max_bytes: a larger file is not read.

    Raises:
        HipaError: no regular file, or a larger one; damaged; it holds objects that could run code,
            or tensors that are larger than the file, sparse or of a form that no model has.

    """
    import torch

    check_stored(path, max_bytes, _SAFE)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    try:
        inert = _inert_classes(path) if is_zip else []
        safe = torch.serialization.safe_globals([*allowed, *inert])
        with warnings.catch_warnings(), safe:
            # torch warns of tensors that are refused below.
            warnings.simplefilter("ignore")
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=mapped and is_zip
            )
    except KeyboardInterrupt:
        raise
    # A damaged file raises errors of every kind.
    except BaseException as error:
        raise_interruption()
        raise _refused(path, error) from None
    _check_tensors(path, content)
    return content


class _Inert:
    """Stands for a class of a training's state: it takes anything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _inert_classes(path: Path) -> list[Any]:
    """What torch may build in place of PyTorch Lightning's classes and numpy's numbers.

    The published .ckpt files of SD 1.x were saved by a training of Lightning: beside the weights
    they name its classes, and have numbers of numpy. (The file itself was not at hand: ComfyUI and
    pickle scanners allow the same names for them.) That state is not needed. No code of Lightning
    is imported for it, and none of numpy is called.
    """
    import torch

    inert: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        if name.startswith(_TRAINING_TOOLS) or name in _NUMPY:
            inert.append((_Inert, name))
    return inert


def _refused(path: Path, error: BaseException) -> HipaError:
    """What to say of a file that torch refuses; its advice to run the file's code is left out."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        # Not every release of torch names what it refused.
        more = ""
        if isinstance(error, pickle.UnpicklingError):
            more = ", or it holds more, which could run code when it is read"
        return HipaError(f"{path} is damaged: torch cannot read it as weights{more}. {_SAFE}")
    return HipaError(
        f"{path} holds more than weights: {found[1]}. That can run code, so the file is not "
        "loaded. Use a .safetensors file."
    )


def _check_archive(path: Path) -> None:
    """Check that the members are stored as they are: a compressed one may hold any size."""
    with as_line(f"{path} is damaged", _SAFE), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise HipaError(f"{path} is compressed, which torch.save never does. {_SAFE}")


def _check_tensors(path: Path, content: Any) -> None:
    """Check that the tensors are plain ones, and not larger than the file."""
    import torch

    size = 0
    for tensor in _tensors(path, content):
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.is_quantized or tensor.is_nested:
            raise HipaError(f"{path} holds a tensor that is sparse or quantised. {_SAFE}")
        size += tensor.numel() * tensor.element_size()
    most = path.stat().st_size * _SHARED
    if size > most:
        raise HipaError(
            f"{path} is damaged: its tensors would have {size} bytes, the file {most // _SHARED}. "
            f"{_SAFE}"
        )


def _tensors(path: Path, content: Any) -> Iterator[Tensor]:
    """Every tensor in a tree of containers.

    Raises:
        HipaError: there are too many values, or containers within containers.

    """
    import torch

    waiting = [(content, 0)]
    seen = 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > _MAX_VALUES or depth > _MAX_DEPTH:
            raise HipaError(f"{path} is damaged: it nests too deep, or without an end. {_SAFE}")
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, torch.nn.ParameterDict)):
            waiting.extend((inner, depth + 1) for inner in value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend((inner, depth + 1) for inner in value)
