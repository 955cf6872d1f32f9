"""What is served for the page: its files, their headers, what needs a key."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
from pathlib import Path

import httpx
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.example_source import example_image
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import ImageService
from hipa_deploy.serve.settings import Limits
from hipa_deploy.serve.web import page_routes
from hipa_deploy.serve.web.web_app import web_app
from tests.served import tiny_bundles

KEY = "0123456789abcdef"
PAGE = Path(page_routes.__file__).parent / "page"
OWN = "http://localhost"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    return tiny_bundles(tmp_path_factory.mktemp("bundles"))


def get(path: str, *bundles: str, keys: tuple[str, ...] = (), **headers: str) -> httpx.Response:
    """An answer of a service that has loaded no model."""
    service = ImageService(Models(bundles or ("emoji",)), Limits())
    transport = httpx.ASGITransport(web_app(service, keys=keys))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url=OWN) as client:
            return await client.get(path, headers=headers)

    try:
        return asyncio.run(ask())
    finally:
        service.close()


@pytest.mark.parametrize("path", ["/", *(f"/page/{path.name}" for path in sorted(PAGE.iterdir()))])
def test_every_file_is_served_without_a_key_and_with_its_policy(path: str) -> None:
    answer = get(path, keys=(KEY,))
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert not re.search(r"https?:|unsafe|\*", answer.headers["content-security-policy"])
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers["referrer-policy"] == "same-origin"
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    kind = kinds.get(Path(path).suffix, "text/html")
    assert answer.headers["content-type"].partition(";")[0] == kind
    name = Path(path).name or "index.html"
    assert answer.content == (PAGE / name).read_bytes()


def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    first = get("/page/main.js")
    again = get("/page/main.js", **{"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize("name", ["none.js", "..%2fguard.py", "%2e%2e/guard.py", "page_routes.py"])
def test_nothing_else_is_served(name: str) -> None:
    answer = get(f"/page/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/page/about", "/page/none.js", "/hipa/models"])
def test_what_tells_of_the_models_needs_the_key(path: str) -> None:
    assert get(path, keys=(KEY,)).status_code == 401


def test_about_has_an_example_that_the_model_was_made_for(bundles: dict[str, Bundle]) -> None:
    answer = get("/page/about", "emoji", str(bundles["tiny-edit"].root)).json()
    assert answer["prompts"]["emoji"] == {"example": "3d emoji of a red apple", "known": []}
    assert answer["prompts"]["tiny-edit"]["example"]
    assert answer["limits"] == {
        "prompt": 4000,
        "body": 1 << 25,
        "pixels": 1 << 24,
        "steps": {"min": 2, "max": 100},
    }


def test_about_has_the_hashes_that_images_carry(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["tiny-edit"]
    models = get("/page/about", str(bundle.root)).json()["models"]
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        (parameters,) = pipe.edit(example_image(32, 32, number=3), "a green pear").parameters
    assert models == {
        "tiny-edit": {"bundle": parameters["bundle"], "unet": parameters["unet"]},
    }


def test_about_has_the_closed_set_of_a_bundle_without_a_text_encoder(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """A bundle of which the export has baked the prompts, as far as the page looks at it."""
    root = shutil.copytree(bundles["tiny"].root, tmp_path / "baked")
    (root / "prompts").mkdir()
    prompts = root / "prompts" / "prompts.txt"
    prompts.write_text("a red apple\na green pear\n")
    manifest = json.loads((root / "hipa.json").read_text())
    manifest["stages"] = [it for it in manifest["stages"] if it["spec"]["name"] != "text_encoder"]
    manifest["files"]["prompts/prompts.txt"] = hashlib.sha256(prompts.read_bytes()).hexdigest()
    (root / "hipa.json").write_text(json.dumps(manifest))
    known = get("/page/about", str(root)).json()["prompts"]["baked"]["known"]
    assert known == ["a red apple", "a green pear"]


def test_a_bundle_without_a_reference_has_no_example(bundles: dict[str, Bundle]) -> None:
    root = bundles["tiny"].root
    (root / "reference" / "prompts.json").unlink()
    answer = get("/page/about", str(root)).json()
    assert answer["prompts"]["tiny"] == {"example": None, "known": []}


def test_the_files_name_no_other_host_and_build_no_markup_from_text() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", text, flags=re.MULTILINE), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_every_module_that_is_imported_is_there() -> None:
    for path in PAGE.glob("*.js"):
        for name in re.findall(r'from "\./([\w.]+)"', path.read_text(encoding="utf-8")):
            assert (PAGE / name).is_file(), (path, name)
