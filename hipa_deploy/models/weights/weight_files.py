"""Which files of a folder hold the weights that are loaded, among all that lie there.

A folder from a hub often holds the same weights several times: in two precisions, in one file and
in shards, as .safetensors and as .bin. Every command loads the same ones:

1. full precision before half precision (variant fp16, then bf16);
2. .safetensors before .bin;
3. shards or one file as the library takes them: diffusers looks for shards first, transformers for
   one file.

Other variants, such as non_ema, are other weights. They are never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hipa_deploy.disk.reading import name_problem, read_json, shown
from hipa_deploy.errors import HipaError

# The names before the first dot: of diffusers' parts, and of transformers' in both formats.
DIFFUSERS = "diffusion_pytorch_model"
STEMS = (DIFFUSERS, "model", "pytorch_model")
PRECISIONS = ("", "fp16", "bf16")  # of a variant; the first is full precision
FORMATS = ("safetensors", "bin")
AGAIN = "Copy the model again."
SHARD = re.compile(rf"({'|'.join(STEMS)})[.\w]*-\d+-of-\d+\.")
# The VAE's attention in folders of diffusers before 0.12, as SD 1.5 and 2.1 were published. Today's
# diffusers renames it in the same way when it loads one.
OLD_ATTENTION = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# CLIP's text encoder without 'text_model' in its names: transformers before 4.0, and since 5.6.
BARE_TEXT = re.compile(
    r"(embeddings\.|encoder\.layers\.\d+\.(self_attn|layer_norm\d|mlp)\.|final_layer_norm\.).*"
)


class _Candidate(NamedTuple):
    """A file that the weights could be loaded from: they are, or it lists the files they are in."""

    path: Path
    variant: str
    kind: str
    is_index: bool
    stem: str

    def rank(self) -> tuple[int, int, bool]:
        """The order in which candidates are taken: the smallest first."""
        shards_first = self.stem == DIFFUSERS
        second = self.is_index != shards_first
        return PRECISIONS.index(self.variant), FORMATS.index(self.kind), second


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the files that a part's weights are loaded from: one, or its shards.

    Args:
        folder: of one part, such as a model's unet.

    Raises:
        HipaError: the folder does not exist, has no weights, or lacks a shard.

    Example:
        >>> [path.name for path in find_weights(Path("stable-diffusion-v1-5/unet"))]
        ['diffusion_pytorch_model.safetensors']

    """
    if not folder.is_dir():
        raise HipaError(f"{folder} does not exist. Expected a folder with weights. {AGAIN}")
    candidates = []
    for path in sorted(folder.iterdir()):
        candidate = _parse(path)
        if candidate is not None and path.is_file():
            candidates.append(candidate)

    chosen = _first(candidates)
    if chosen is None:
        raise _no_weights(folder, candidates)
    if chosen.is_index:
        return _shards(chosen.path)
    return (chosen.path,)


def file_to_load(names: Iterable[str]) -> tuple[str, bool] | None:
    """Choose among the names of a folder's files as ``find_weights`` does.

    Returns:
        The file that the weights are loaded from, and whether it is the index of shards; None
        where no file holds weights.

    Example:
        >>> file_to_load(["model.fp16.safetensors", "model.safetensors", "model.bin"])
        ('model.safetensors', False)

    """
    parsed = [_parse(Path(name)) for name in sorted(names) if "/" not in name]
    chosen = _first([candidate for candidate in parsed if candidate is not None])
    return None if chosen is None else (chosen.path.name, chosen.is_index)


def current_name(name: str) -> str:
    """Return the one name of a tensor that versions of diffusers and transformers name differently.

    Example:
        >>> current_name("decoder.mid_block.attentions.0.query.weight")
        'decoder.mid_block.attentions.0.to_q.weight'

    """
    if BARE_TEXT.fullmatch(name):
        return f"text_model.{name}"
    match = OLD_ATTENTION.fullmatch(name)
    if match is None:
        return name
    layer, old, kind = match.groups()
    return f"{layer}.{NEW_ATTENTION[old]}.{kind}"


def _first(candidates: Iterable[_Candidate]) -> _Candidate | None:
    """The candidate that is taken; None where none is of a precision that is loaded."""
    usable = [candidate for candidate in candidates if candidate.variant in PRECISIONS]
    return min(usable, key=_Candidate.rank) if usable else None


def _parse(path: Path) -> _Candidate | None:
    """Read what a file is from its name; None for one that holds no weights, and for a shard.

    The variant stands at one of several places in the name of an index, by the version of the
    library that wrote it: model.safetensors.index.fp16.json, model.fp16.safetensors.index.json.
    """
    stem, *rest = path.name.lower().split(".")
    if stem not in STEMS:
        return None
    kind = next((name for name in FORMATS if name in rest), None)
    is_index = rest[-2:] == ["index", "json"] or (rest[-1:] == ["json"] and "index" in rest)
    if kind is None or not (is_index or rest[-1] == kind):
        return None
    variant = [name for name in rest if name not in (*FORMATS, "index", "json")]
    return _Candidate(path, ".".join(variant), kind, is_index, stem)


def listed_names(index: Path) -> list[str]:
    """Return the names of the files that an index of shards lists, in order.

    Raises:
        HipaError: it is no index, or names a file elsewhere.

    """
    content = read_json(index, remedy=AGAIN)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        raise HipaError(f"{index} is no index of shards. {AGAIN}")
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        # A file elsewhere would be read, and hashed, as if it were the model's.
        problem = name_problem(name)
        if problem:
            raise HipaError(f"{index}: the file name {shown(name)} {problem}. {AGAIN}")
    return names


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the files that an index lists, in the order of their names."""
    names = listed_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise HipaError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} "
            f"lists: {', '.join(missing[:3])}. {AGAIN}"
        )
    return tuple(index.parent / name for name in names)


def _no_weights(folder: Path, others: list[_Candidate]) -> HipaError:
    """Return the error for a folder without weights that could be loaded."""
    for path in sorted(folder.iterdir()):
        # The hub's cache consists of links into one folder of contents, which may be incomplete.
        if path.is_symlink() and not path.exists():
            return HipaError(f"{path} links to a file that is not there. Download the model again.")
    if others:
        path = others[0].path
        name = path.name.replace(f".{others[0].variant}", "")
        return HipaError(
            f"{folder} has weights of the variant {others[0].variant} alone, which is not loaded. "
            f"Rename {path.name} to {name} to use it."
        )
    if any(SHARD.match(path.name) for path in folder.iterdir()):
        return HipaError(
            f"{folder} has shards, and no .index.json that says what is in them. {AGAIN}"
        )
    return HipaError(
        f"{folder} has no weights: no {DIFFUSERS} or model that ends in .safetensors or .bin. "
        f"{AGAIN}"
    )
