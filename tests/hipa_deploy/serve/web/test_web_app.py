"""The application around the routes: CORS, and requests for images. No bundle is loaded."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import ImageService
from hipa_deploy.serve.settings import Limits
from hipa_deploy.serve.web.web_app import web_app

SITE = "https://friend.example"
PRIVATE = "access-control-request-private-network"  # of Chromium before 142


def sent_by_the_client() -> set[str]:
    """The headers that OpenAI's client adds to a request, which a browser asks for first."""
    seen: set[str] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        seen.update(request.headers.keys())
        return httpx.Response(200, json={"object": "list", "data": []})

    client = openai.OpenAI(
        base_url="http://localhost/v1", api_key="k", organization="o", project="p",
        http_client=httpx.Client(transport=httpx.MockTransport(answer)),
    )  # fmt: skip
    client.models.list()
    return {name for name in seen if name.startswith(("x-", "openai-"))}


@pytest.mark.parametrize("asks", [{}, {PRIVATE: "true"}], ids=["", "private network"])
@pytest.mark.parametrize(("origin", "status"), [(SITE, 200), ("https://evil.example", 400)])
def test_a_browser_asks_for_the_headers_of_the_client(
    bundles: dict[str, Bundle], origin: str, status: int, asks: dict[str, str]
) -> None:
    service = ImageService(Models([f"m={bundles['tiny'].root}"]), Limits())
    app = web_app(service, origins=[SITE])
    wanted = {"authorization", "content-type", *sent_by_the_client()}
    assert {"x-stainless-lang", "openai-organization", "openai-project"} <= wanted

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            headers = {
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": ",".join(sorted(wanted)),
                **asks,
            }
            return await http.options("/v1/images/generations", headers=headers)

    answer = asyncio.run(ask())
    service.close()
    assert answer.status_code == status
    assert ("access-control-allow-origin" in answer.headers) == (status == 200)
    if status == 200:
        assert answer.headers["access-control-allow-origin"] == SITE
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert wanted <= {name.strip() for name in allowed.split(",")}
        allows = answer.headers.get("access-control-allow-private-network")
        assert allows == asks.get(PRIVATE)


def test_a_task_that_no_model_is_for(bundles: dict[str, Bundle]) -> None:
    service = ImageService(Models([f"m={bundles['tiny'].root}"]), Limits())
    app = web_app(service)

    async def ask(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            form = {"data": {"prompt": "a"}, "files": {"image": b"no matter"}}
            return await http.post(path, **form)

    answers = [asyncio.run(ask(path)) for path in ("/v1/images/edits", "/hipa/upscale")]
    service.close()
    errors = [answer.json()["error"] for answer in answers]
    assert [error["code"] for error in errors] == ["model_not_found"] * 2
    assert errors[0]["message"].startswith("No model here is to edit or inpaint.")
    assert errors[1]["message"].startswith("No model here is to upscale.")


@pytest.mark.parametrize("prefix", ["", "/behind"])
def test_a_bug_is_an_answer_and_a_line_in_the_log(
    bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    prefix: str,
) -> None:
    service = ImageService(Models([f"m={bundles['tiny'].root}"]), Limits())
    app = web_app(service)

    async def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(service, "deliver", fail)

    async def ask() -> httpx.Response:
        # The framework, which answers behind a prefix, raises what it has answered with 500.
        transport = httpx.ASGITransport(app, root_path=prefix, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post(f"{prefix}/hipa/generate", json={"prompt": "an apple"})

    answer = asyncio.run(ask())
    service.close()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["bug"]
    assert b'_total{route="/hipa/generate",status="500"} 1.0' in service.metrics.text()


@pytest.mark.parametrize("prefix", ["", "/img"])
def test_a_part_of_another_application_is_open_as_it_is_alone(
    bundles: dict[str, Bundle], prefix: str
) -> None:
    """Health checks and the page that asks for the key need none; all else does."""
    service = ImageService(Models([f"m={bundles['tiny'].root}"]), Limits())
    app = Starlette(routes=[Mount(prefix, web_app(service, keys=["a-key"]))])
    client = TestClient(app, base_url="http://localhost")
    for path in ("/health/live", "/", "/page/main.js"):
        assert client.get(prefix + path).status_code == 200
    assert client.get(f"{prefix}/health/ready").status_code == 503  # nothing is loaded
    assert client.get(f"{prefix}/hipa/models").status_code == 401
    key = {"authorization": "Bearer a-key"}
    assert client.get(f"{prefix}/hipa/models", headers=key).status_code == 200
    # A path that only looks like an open one.
    assert client.get(f"{prefix}{prefix}/x/health/live").status_code == 401
