"""What the cards of adaptors and bundles have in common: front matter, tables, sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.publish.base_model import BaseModel

PIPELINE_TAGS = {
    "generate": "text-to-image",
    "edit": "image-to-image",
    "inpaint": "image-to-image",
    "upscale": "image-to-image",
    "control": "image-to-image",
}
PROJECT = "hipa-deploy"


def front_matter(
    base: BaseModel, *, task: str, library: str, tags: Sequence[str], **more: Any
) -> str:
    """The YAML block that the hub reads, between its lines of dashes.

    Its fields: https://huggingface.co/docs/hub/model-cards#model-card-metadata. A base model that
    is not on the hub is left out, since the hub takes nothing but an id there.
    """
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": PIPELINE_TAGS[task],
        "tags": list(tags),
        **more,
    }
    if base.hub_id:
        fields["base_model"] = base.hub_id
        if "lora" in tags:
            fields["base_model_relation"] = "adapter"
    if base.licence:
        fields["license"] = base.licence
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def table(rows: Mapping[str, object]) -> str:
    """Two columns without a heading, in Markdown."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        lines.append(f"| {_cell(name)} | {_cell(value)} |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def bullets(lines: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def files_table(folder: Path) -> str:
    """Every file that is in ``folder`` now: size and SHA-256."""
    lines = ["| file | bytes | SHA-256 |", "|---|---|---|"]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            lines.append(f"| {_cell(name)} | {path.stat().st_size:,} | `{file_sha256(path)}` |")
    return "\n".join(lines)


def licence_text(base: BaseModel, what: str) -> str:
    """The section on the licence."""
    if base.licence is None:
        return (
            f"The licence of the base model ({base.name}) is not stated here. {what} is made from "
            "that model: its licence applies. Read it before you use or share this."
        )
    return f"{what} is made from {base.name}, whose licence is {base.licence}. It applies here too."


def added_text(loras: Sequence[Any], embeddings: Sequence[Any]) -> list[str]:
    """A sentence for each LoRA and embedding: records of a manifest or an adaptor."""
    lines = []
    for lora in loras:
        lines.append(f"LoRA {lora.name} at {lora.scale:g} (SHA-256 `{lora.sha256}`)")
    for word in embeddings:
        lines.append(f"embedding {word.name}, the word {word.token} (SHA-256 `{word.sha256}`)")
    return lines


def sections(parts: Mapping[str, str]) -> str:
    """Headings of the second level and their texts; empty texts are left out."""
    return "\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items() if text) + "\n"
