"""Changes of the files that hold weights, and of TOML: the structure is kept, a value in it not."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

Edit = tuple[Any, ...]
NUMBERS = [0, 1, -1, 2, 7, 1000, 65_536, 2**31, 2**53, 2**63 - 1, 2**63, 10**12, 10**30]
NAMES = ["", "x", "../x", "unet.x.lora_A.weight", "alpha", "\ud83d", "a\nb", "x" * 5000, "a\0b"]
# What a LoRA's header may say beside the tensors.
LORA_CONFIGS = [
    {"unet.target_modules": "(.*a)*(.*b)*(.*c)*(.*d)*(x+x+)+y"},
    {"unet.rank_pattern": {"(a+)+$": 3}, "unet.alpha_pattern": {"(.*.*.*.*.*.*.*)*x": 2}},
    {"r": 0, "lora_alpha": float("inf")},
    {"unet.r": "x", "unet.lora_alpha": [1], "unet.alpha_pattern": 7},
    {"unet.megatron_config": {}, "unet.megatron_core": "antigravity"},
    {"unet.init_lora_weights": "pissa"},
    {"unet.r": 10**400, "unet.lora_alpha": 10**400},
    [],
    None,
    "{",
]
CODE = b"cos\nsystem\n(S'touch executed'\ntR."


def safetensors_edits(path: Path) -> st.SearchStrategy[Edit]:
    actions = [
        "dtype", "shape", "start", "end", "drop", "rename", "twice", "length", "deep", "metadata",
        "nan", "resize", "scalar", "type", "grow", "config",
    ]  # fmt: skip
    return st.tuples(
        st.sampled_from(actions),
        st.integers(0, 300),
        st.sampled_from([*NUMBERS, *NAMES, "I64", "F4", "BOOL", "C64"]),
    )


def pickle_edits(path: Path) -> st.SearchStrategy[Edit]:
    actions = [
        "expand", "empty sparse", "drop", "rename", "value", "nan", "shape", "code", "deflate",
        "deep",
        "meta", "quantised", "type", "cycle", "grow", "key",
    ]  # fmt: skip
    values = [*NUMBERS, *NAMES, None, [], {}, float("nan"), float("inf"), True]
    return st.tuples(st.sampled_from(actions), st.integers(0, 300), st.sampled_from(values))


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: str, data: bytes, length: int | None = None) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    length = len(text) if length is None else length
    return struct.pack("<Q", length % 2**64) + text + data


def apply_safetensors(path: Path, edit: Edit) -> None:
    from safetensors.torch import load_file, save_file

    action, index, value = edit
    if action in ("nan", "resize", "scalar", "type", "grow", "config"):
        with path.open("rb") as file:
            header, _ = _split(file.read())
        metadata = header.get("__metadata__") or {}
        tensors = load_file(path)
        name = sorted(tensors)[index % len(tensors)]
        if action == "config":
            metadata["lora_adapter_metadata"] = json.dumps(LORA_CONFIGS[index % len(LORA_CONFIGS)])
        else:
            tensors[name] = _changed(tensors[name], action, index)
        save_file(tensors, path, metadata)
        return

    header, data = _split(path.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    name = names[index % len(names)]
    entry = header[name]
    text = None
    length = None
    if action == "dtype":
        entry["dtype"] = value
    elif action == "shape":
        entry["shape"] = [value, *entry["shape"][1:]]
    elif action in ("start", "end"):
        entry["data_offsets"][action == "end"] = value
    elif action == "drop":
        del header[name]
    elif action == "rename":
        header[str(value)] = header.pop(name)
    elif action == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    elif action == "length":
        length = value if isinstance(value, int) else 10**9
    elif action == "deep":
        text = '{"a":' * 50_000 + "1" + "}" * 50_000
    elif action == "metadata":
        header["__metadata__"] = value
    path.write_bytes(_joined(text or json.dumps(header), data, length))


def _changed(tensor: torch.Tensor, action: str, index: int) -> torch.Tensor:
    if action == "nan" and tensor.is_floating_point():
        return torch.full_like(tensor, float("nan" if index % 2 else "inf"))
    if action == "resize":
        return torch.zeros([*tensor.shape, 1] if index % 2 else tensor.shape[:1])
    if action == "scalar":
        return torch.tensor(1e30 if index % 2 else 0.0)
    if action == "type":
        types = [torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn]
        return tensor.to(types[index % len(types)])
    if action == "grow":
        return torch.zeros(100_000 if index % 2 else 0, *tensor.shape[1:2])
    return tensor


def apply_pickle(path: Path, edit: Edit) -> None:
    action, index, value = edit
    if action == "code":
        path.write_bytes(CODE)
        return
    content = torch.load(path, weights_only=True)
    if action == "deflate":
        _deflate(path)
        return
    holder, key = _place(content, index)
    new = _pickled_value(holder[key], action, index, value)
    if action == "drop":
        del holder[key]
    elif action == "rename":
        holder[value if index % 2 else str(value)] = holder.pop(key)
    elif action == "key":
        holder[f"{key}2"] = holder[key]
    elif action == "cycle":
        holder[key] = content
    else:
        holder[key] = new
    torch.save(content, path)


def _pickled_value(old: Any, action: str, index: int, value: Any) -> Any:
    if action == "expand":
        return torch.zeros(1).expand(10**6, 10**6)
    if action == "empty sparse":
        return torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.int64), [], (10**6, 10**6))
    if action == "meta":
        return torch.empty(10**6, 10**6, device="meta")
    if action == "quantised":
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    if action == "deep":
        for _ in range(400):
            old = [old] if index % 2 else {"a": old}
        return old
    if isinstance(old, torch.Tensor) and action in ("nan", "type", "grow"):
        return _changed(old, action, index)
    if action == "shape":
        return torch.zeros(3, 5)
    return value


def _place(content: Any, index: int) -> tuple[Any, Any]:
    """A container in the tree, and a key of it; the numbers of ``index`` choose the way."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[index % len(keys)]
        inner = content[key]
        index //= 3
        if isinstance(inner, (dict, list)) and len(inner) and index % 4:
            content = inner
            continue
        return content, key


def _deflate(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def dump_toml(table: dict[str, Any], prefix: str = "") -> str:
    """TOML of tables, lists and plain values; what TOML has no form for is left out."""
    lines = []
    tables = []
    for key, value in table.items():
        name = prefix + json.dumps(key)
        if isinstance(value, dict):
            tables.append(f"[{name}]\n{dump_toml(value, name + '.')}")
        elif value is not None:
            lines.append(f"{json.dumps(key)} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(part) for part in value if part is not None)}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).replace("e-0", "e-")


EDITS: dict[str, Callable[[Path], st.SearchStrategy[Edit]]] = {
    "safetensors": safetensors_edits,
    "pickle": pickle_edits,
}
APPLY: dict[str, Callable[[Path, Edit], None]] = {
    "safetensors": apply_safetensors,
    "pickle": apply_pickle,
}
