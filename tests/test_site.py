"""The documentation site builds strictly, holds together, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
# Attributes that make a browser load something. A link that a reader clicks is none.
LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "use": ("href", "xlink:href"),
}

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="no release of the site's generator supports Python 3.10"
)


class Addresses(HTMLParser):
    """The addresses in a page: ``loaded`` by the browser, ``linked`` for the reader."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.linked.append(values["href"])
        # A canonical link is an address that search engines read; the browser loads nothing.
        if values.get("rel") != "canonical":
            self.loaded += [values[name] for name in LOADS.get(tag, ()) if name in values]


@pytest.fixture(scope="module")
def site() -> Path:
    """Build the site as `make docs` does."""
    command = [Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Addresses]:
    """Every page of the site with its addresses."""
    return {path: Addresses(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_source_is_a_page(site: Path) -> None:
    docs = ROOT / "docs"
    sources = {path.relative_to(docs).with_suffix(".html") for path in docs.rglob("*.md")}
    assert sources <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/-]+\.md)$", text, flags=re.MULTILINE))
    docs = ROOT / "docs"
    assert listed == {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}


def test_nothing_is_loaded_from_another_host(pages: dict[Path, Addresses]) -> None:
    for path, addresses in pages.items():
        foreign = [address for address in addresses.loaded if urlsplit(address).netloc]
        assert foreign == [], path


def test_styles_load_nothing_from_another_host(site: Path) -> None:
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"url\(\s*[\"']?(?:https?:)?//", text) == [], path
        assert re.findall(r"@import[^;]*//", text) == [], path


def test_local_addresses_exist(site: Path, pages: dict[Path, Addresses]) -> None:
    for path, addresses in pages.items():
        if path.name == "404.html":  # its addresses are absolute: it is shown at any depth
            continue
        for address in addresses.loaded + addresses.linked:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            assert target.is_file(), f"{path}: {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {address}"


def test_scripts_are_no_part_of_it(site: Path) -> None:
    assert list(site.rglob("*.py")) == []


def test_the_commands_are_the_codes(site: Path) -> None:
    from typer.main import get_command

    from hipa_deploy.commands.app import app

    anchors = Addresses((site / "reference/commands.html").read_text(encoding="utf-8")).anchors
    for name in get_command(app).commands:
        assert f"hipa-{name.replace(' ', '-')}" in anchors, name


def test_the_recipe_keys_are_the_codes(site: Path) -> None:
    from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

    text = (site / "reference/recipe-keys.html").read_text(encoding="utf-8")
    for model in (Recipe, DecoderRecipe):
        for name in model.model_fields:
            assert f"<code>{name}</code>" in text or f"<code>[{name}]</code>" in text, name


def test_the_main_class_is_documented(site: Path) -> None:
    anchors = Addresses((site / "reference/python.html").read_text(encoding="utf-8")).anchors
    for name in ("load", "stream", "__call__", "edit", "inpaint", "upscale", "swap_adaptor"):
        assert f"hipa_deploy.generate.pipeline.OneStepPipeline.{name}" in anchors, name


def test_examples_of_docstrings_are_code(site: Path) -> None:
    text = (site / "reference/python.html").read_text(encoding="utf-8")
    assert "<blockquote>" not in text  # what Markdown makes of '>>>' outside code
    assert "Examples:" in text
