"""What a stranger may change in a file: its structure is kept, and a value in it is not.

An edit is plain data, so that a failing example can be copied into tests/hostile/test_hostile.py.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st

from tests.hostile import image_mutations, weights_mutations
from tests.hostile.weights_mutations import dump_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST = 10**9  # bytes; a file that was made larger is not changed any more
Edit = tuple[Any, ...]
"""The name of a change and what it needs; the first word decides, see ``apply``."""

NUMBERS = [
    0, 1, -1, 2, 3, 7, 63, 64, 65, 1000, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**12,
    10**18, 10**400, -(10**12), 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "x", "../../../x", "/etc/passwd", "/dev/zero", "..", ".", "a\0b", "a\nb", "\x1b[2J",
    "\ud800", "\u202e", "unet", "generator", "tokens", "images", "noise", "hipa.json",
    "unet/model.onnx", "x" * 100_000, "float32", "float16", "int64", "batch", "%s%n",
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, [1] * 10_000]
VALUES = [*NUMBERS, *TEXTS, *OTHERS]
# The whole file replaced.
CONTENTS = {
    "empty": b"",
    "null": b"null",
    "text": b"hello",
    "list": b"[]",
    "table": b"{}",
    "open brackets": b"[" * 200_000,
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep table": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "NaN": b'{"schema_version": NaN}',
    "UTF-16": '{"schema_version": 1}'.encode("utf-16"),
    "no text": b"\xff\xfe\xfd\x00" * 100,
    "zeros": b"\0" * 100_000,
    "zip without members": b"PK\x05\x06" + b"\0" * 18,
}


def mutations(kind: str, path: Path) -> st.SearchStrategy[list[Edit]]:
    """Lists of one to three edits for the file at ``path``."""
    raw = st.one_of(
        st.tuples(st.just("content"), st.sampled_from(sorted(CONTENTS))),
        st.tuples(st.just("cut"), st.integers(0, 199)),
        st.tuples(st.just("byte"), st.integers(0, 10**6), st.integers(0, 255)),
        st.tuples(st.just("sparse"), st.just(40 * 10**9)),
        st.just(("pipe",)),
        st.just(("folder",)),
        st.just(("device",)),
        st.just(("gone",)),
    )
    inside = _INSIDE[kind](path) if kind in _INSIDE else raw
    # Mostly changes within the structure: the others stop at the first check.
    return st.lists(st.one_of(inside, inside, inside, inside, raw), min_size=1, max_size=3)


def _json_edits(path: Path) -> st.SearchStrategy[Edit]:
    tree = json.loads(path.read_text())
    return st.tuples(
        st.sampled_from(["set", "set", "set", "remove", "add", "repeat", "rename"]),
        _places(tree),
        st.sampled_from(VALUES),
    )


@st.composite
def _places(draw: st.DrawFn, tree: Any) -> tuple[str | int, ...]:
    """The way to a value of the tree, from the root down; never the root itself."""
    place: list[str | int] = []
    while isinstance(tree, (dict, list)) and tree:
        if place and draw(st.integers(0, 3)) == 0:
            break
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = draw(st.sampled_from([*keys[:12], keys[-1]]))
        place.append(key)
        tree = tree[key]
    return tuple(place)


def _npz_edits(path: Path) -> st.SearchStrategy[Edit]:
    with np.load(path) as arrays:
        names = sorted(arrays.files)[:8]
    return st.tuples(
        st.sampled_from(["shape", "dtype", "drop", "twice", "other", "bomb", "objects", "fill"]),
        st.sampled_from(names),
        st.sampled_from(NUMBERS[:20]),
    )


def _npy_edits(path: Path) -> st.SearchStrategy[Edit]:
    return st.tuples(
        st.sampled_from(["shape", "dtype", "objects", "fill", "other"]),
        st.just(""),
        st.sampled_from(NUMBERS[:20]),
    )


def _onnx_edits(path: Path) -> st.SearchStrategy[Edit]:
    return st.tuples(
        st.sampled_from(
            ["operator", "input", "dims", "external", "attribute", "drop node", "output shape"]
        ),
        st.integers(0, 500),
        st.sampled_from([*NUMBERS[:20], *TEXTS[:10], "Loop", "ConstantOfShape", "model.onnx"]),
    )


def _toml_edits(path: Path) -> st.SearchStrategy[Edit]:
    tree = tomllib.loads(path.read_text())
    return st.tuples(
        st.sampled_from(["set", "set", "set", "remove", "add", "repeat", "rename"]),
        _places(tree),
        st.sampled_from(VALUES),
    )


_INSIDE = {
    "json": _json_edits,
    "toml": _toml_edits,
    "npz": _npz_edits,
    "npy": _npy_edits,
    "onnx": _onnx_edits,
    **weights_mutations.EDITS,
    **image_mutations.EDITS,
}


def apply(kind: str, path: Path, edits: list[Edit]) -> None:
    """Change the file at ``path``, one edit after the other, as far as it can still be changed."""
    for edit in edits:
        if edit[0] in _RAW:
            _RAW[edit[0]](path, *edit[1:])
        elif path.is_file() and path.stat().st_size < _LARGEST:
            try:
                _APPLY[kind](path, edit)
            # An edit before this one left no file of that format.
            except Exception:
                continue


def _replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _cut(path: Path, kept_percent: int) -> None:
    if path.is_file():
        os.truncate(path, path.stat().st_size * kept_percent // 200)


def _byte(path: Path, offset: int, value: int) -> None:
    if path.is_file() and path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(offset % path.stat().st_size)
            file.write(bytes([value]))


def _special(path: Path, kind: str) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")


def _sparse(path: Path, size: int) -> None:
    if path.is_file():
        os.truncate(path, size)


_RAW: dict[str, Any] = {
    "content": lambda path, name: _special(path, "gone") or _replace(path, CONTENTS[name]),
    "cut": _cut,
    "byte": _byte,
    "sparse": _sparse,
    "pipe": lambda path: _special(path, "pipe"),
    "folder": lambda path: _special(path, "folder"),
    "device": lambda path: _special(path, "device"),
    "gone": lambda path: _special(path, "gone"),
}


def _apply_json(path: Path, edit: Edit) -> None:
    tree = json.loads(path.read_text())
    _change_tree(tree, edit)
    path.write_text(json.dumps(tree))


def _apply_toml(path: Path, edit: Edit) -> None:
    tree = tomllib.loads(path.read_text())
    _change_tree(tree, edit)
    path.write_text(dump_toml(tree), errors="surrogatepass")


def _change_tree(tree: Any, edit: Edit) -> None:
    action, place, value = edit
    holder = tree
    for key in place[:-1]:
        holder = holder[key]
    last = place[-1]
    if action == "set":
        holder[last] = value
    elif action == "remove":
        del holder[last]
    elif action == "repeat" and isinstance(holder, list):
        holder.extend([holder[last]] * 3)
    elif action == "rename" and isinstance(holder, dict):
        holder[str(value)] = holder.pop(last)
    elif isinstance(holder, dict):
        holder[f"{last}2"] = value


def _header_bytes(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The beginning of a .npy file that promises this dtype and shape."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _apply_npz(path: Path, edit: Edit) -> None:
    action, name, number = edit
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    member = f"{name}.npy"
    compression = zipfile.ZIP_STORED
    if action == "bomb":
        members[member] = _header_bytes("<f4", (2**28,)) + b"\0" * (300 << 20)
        compression = zipfile.ZIP_DEFLATED
    elif action == "drop":
        members.pop(member, None)
    elif action == "other":
        members["../../x.npy"] = members[member]
    else:
        members[member] = _changed_array(members[member], action, number)
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for inner, content in members.items():
            archive.writestr(inner, content)
        if action == "twice":
            archive.writestr(member, members[member])


def _apply_npy(path: Path, edit: Edit) -> None:
    action, _, number = edit
    path.write_bytes(_changed_array(path.read_bytes(), action, number))


def _changed_array(content: bytes, action: str, number: Any) -> bytes:
    array = np.load(io.BytesIO(content))
    if action == "shape":
        number = int(number)
        return _header_bytes(array.dtype.str, (number, *array.shape[1:])) + array.tobytes()
    if action == "dtype":
        return _header_bytes("|O", array.shape) + array.tobytes()
    target = io.BytesIO()
    if action == "objects":
        np.save(target, np.asarray([{"a": 1}], dtype=object), allow_pickle=True)
    elif action == "fill":
        np.save(target, np.full_like(array, np.nan if array.dtype.kind == "f" else 1))
    else:
        np.save(target, array.reshape(-1)[:0])
    return target.getvalue()


def _apply_onnx(path: Path, edit: Edit) -> None:
    action, index, value = edit
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    node = graph.node[index % len(graph.node)]
    tensor = graph.initializer[index % len(graph.initializer)]
    if action == "operator":
        node.op_type = str(value)
    elif action == "input" and node.input:
        node.input[index % len(node.input)] = str(value)
    elif action == "dims":
        tensor.dims[:] = [int(value), *tensor.dims[1:]]
    elif action == "external":
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key = "location"
        entry.value = str(value)
    elif action == "attribute" and node.attribute:
        attribute = node.attribute[index % len(node.attribute)]
        attribute.i = int(value)
        attribute.ints[:] = [int(value)] * len(attribute.ints)
    elif action == "drop node":
        graph.node.remove(node)
    elif action == "output shape":
        graph.output[0].type.tensor_type.shape.dim[0].dim_value = int(value)
    path.write_bytes(model.SerializeToString())


_APPLY = {
    "json": _apply_json,
    "toml": _apply_toml,
    "npz": _apply_npz,
    "npy": _apply_npy,
    "onnx": _apply_onnx,
    **weights_mutations.APPLY,
    **image_mutations.APPLY,
}
