"""The page at ``/``: its files, its Content-Security-Policy, and what it must know of the models.

The files are in the folder ``page``. They are read once, and a path is looked up among their names,
so that no path of a request ever reaches the file system.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap, loaded_unet_sha256
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.reference import reference_prompt
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompts import BAKED_PROMPTS, read_baked_prompts
from hipa_deploy.generate.refine.refiner import LEAST_STEPS, MOST_STEPS
from hipa_deploy.serve.served import Model
from hipa_deploy.serve.service import ImageService
from hipa_deploy.serve.web.api_errors import ApiError

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
# Not by the system's table of types: on some machines it calls a script plain text, and a browser
# then refuses to run it.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but this service's own files runs, and nothing is sent to or loaded from another host.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "img-src 'self' blob: data:",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "form-action 'none'",
        "base-uri 'none'",
        "require-trusted-types-for 'script'",
    ]
)
# X-Content-Type-Options stands on every answer of the service (``request_log``).
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time and answered with 304: two releases are never mixed.
    "cache-control": "no-cache",
}
_MOST_PROMPTS = 200  # of a closed set that the page offers

router = APIRouter()


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """The page's files by name."""
    files = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = _File(content, _TYPES[path.suffix], etag)
    return files


def open_paths() -> tuple[str, ...]:
    """The paths that need no API key: the page asks for the key, so it must be there before."""
    return ("/", *(f"/page/{name}" for name in _files()))


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, _INDEX)


@router.get("/page/about", include_in_schema=False)
def about(request: Request) -> dict[str, Any]:
    """What the page must know beside ``/hipa/models``: prompts, hashes, and what is allowed.

    It is no coroutine, because it reads files: the framework runs it in a thread.
    """
    state = request.app.state
    service: ImageService = state.service
    facts = getattr(state, "page_facts", None)
    if facts is None:
        models = service.models
        facts = {
            "prompts": {served.name: _prompts(served.bundle) for served in models.served},
            "models": {name: _hashes(model) for name, model in models.by_name.items()},
        }
        state.page_facts = facts
    limits = service.limits
    return {
        **facts,
        "limits": {
            "prompt": limits.prompt,
            "body": limits.body,
            "pixels": limits.pixels,
            "steps": {"min": LEAST_STEPS, "max": min(limits.steps, MOST_STEPS)},
        },
    }


@router.get("/page/{name}", include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """A file of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise ApiError(404, "There is nothing under this path.", "not_found")
    headers = {**_HEADERS, "etag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


def _hashes(model: Model) -> dict[str, str] | None:
    """What tells a model from others of its name, as the parameters of its images have it.

    None of an adaptor that was damaged since the start: the page is a help.
    """
    bundle = model.served.bundle
    swap = None
    try:
        if model.adaptor:
            swap = AdaptorSwap.open(bundle, model.adaptor, remembered=True)
    except HipaError:
        return None
    return {"bundle": bundle.sha256, "unet": loaded_unet_sha256(bundle, swap)}


def _prompts(bundle: Bundle) -> dict[str, Any]:
    """Prompts that a bundle knows: an example, and the closed set of one without a text encoder.

    The page is a help, so a bundle without a reference has simply no example.
    """
    example = None
    known: list[str] = []
    try:
        example = reference_prompt(bundle)
        if "text_encoder" not in bundle.stages:
            known = read_baked_prompts(bundle.path(BAKED_PROMPTS))[:_MOST_PROMPTS]
    except HipaError:
        pass
    return {"example": example, "known": known}
