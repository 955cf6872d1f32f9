"""Tables that the documentation site makes from the code, so that they cannot go stale.

A page with ``render_macros: true`` at its top calls these functions in double braces. The site
generator loads this module while it builds (``macros`` in mkdocs.yml).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

SCHEMA = Path(__file__).parent / "latency.schema.json"


def define_env(env: Any) -> None:
    """Register the functions that pages may call. The site generator calls this."""
    env.macro(commands)
    env.macro(recipe_keys)
    env.macro(latency_fields)


def commands() -> str:
    """Return the help of every command as Markdown, one section for each.

    Typer writes it. It is asked through its documented command, because this Typer has a copy of
    Click of its own, which plug-ins for Click do not know.
    """
    module = "hipa_deploy.commands.app"
    arguments = [sys.executable, "-m", "typer", module, "utils", "docs", "--name", "hipa"]
    made = subprocess.run(
        arguments, check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout

    # The first section is that of bare `hipa`, whose list of commands the page itself replaces.
    sections = made.split("\n## ")[1:]
    return "\n".join(f"## {section}" for section in sections)


def recipe_keys(kind: str) -> str:
    """Return the keys of a recipe as Markdown, one table for each TOML table.

    Args:
        kind: 'adaptor' or 'decoder'.

    """
    model = {"adaptor": Recipe, "decoder": DecoderRecipe}[kind]
    schema = model.model_json_schema()
    top = {}
    tables = []
    for name, field in schema["properties"].items():
        reference = field.get("$ref")
        if reference is None:
            top[name] = field
        else:
            tables.append((name, _definition(schema, reference)))

    parts = [_table(schema, top, schema.get("required", []))]
    for name, definition in tables:
        parts.append(f"### `[{name}]` of kind {kind}\n\n{definition['description']}")
        parts.append(_table(schema, definition["properties"], definition.get("required", [])))
    return "\n\n".join(parts)


def latency_fields() -> str:
    """Return the records of a latency report as Markdown, from the published JSON Schema."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    parts = [f"## {schema['title']}", schema.get("description", "")]
    parts.append(_table(schema, schema["properties"], schema.get("required", [])))
    for name, definition in schema["$defs"].items():
        # An enumeration has no fields: the table that uses it lists its values.
        if "properties" not in definition:
            continue
        parts += [f"## {name}", definition.get("description", "")]
        parts.append(_table(schema, definition["properties"], definition.get("required", [])))
    return "\n\n".join(parts)


def _table(schema: dict[str, Any], fields: dict[str, Any], required: list[str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if name in required else f"`{json.dumps(field.get('default'))}`"
        meaning = " ".join(field.get("description", "").split())
        cells = (f"`{name}`", _type(schema, field), default, _escape(meaning))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _type(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """Say in words what values a field takes."""
    if "$ref" in field:
        definition = _definition(schema, field["$ref"])
        if "properties" in definition:
            return definition["title"]
        return _type(schema, definition)
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(schema, choice) for choice in field["anyOf"])
    if field.get("type") == "array":
        inner = field.get("items") or field.get("prefixItems", [{}])[0]
        return f"list of {_type(schema, inner)}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"map from names to {_type(schema, field['additionalProperties'])}"
    return field.get("type", "any") + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    limits = [f"{sign} {field[key]:,}" for key, sign in signs.items() if key in field]
    return f" {', '.join(limits)}" if limits else ""


def _definition(schema: dict[str, Any], reference: str) -> dict[str, Any]:
    return schema["$defs"][reference.rsplit("/", maxsplit=1)[-1]]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
