"""Faults that are not the request's: an error of the server, which goes on."""

from __future__ import annotations

import asyncio
import logging
import selectors
import shutil
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.serve import batcher
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import ImageService
from hipa_deploy.serve.settings import LEAST_UPLOADS, Limits
from hipa_deploy.serve.web.web_app import web_app
from tests.served import add_swaps, running, tiny_bundles

HUGE = 3e4  # the weights are still finite in float16, but not what is computed with them


def test_an_adaptor_that_overflows(tmp_path: Path) -> None:
    bundle = tiny_bundles(tmp_path)["tiny"]
    add_swaps(bundle, huge=HUGE)
    with (
        running(str(bundle.root), "--backend", "onnxruntime") as it,
        httpx.Client(base_url=it.url, timeout=60) as client,
    ):
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        (broken,) = [name for name in models if "huge" in name]
        (sound,) = [name for name in models if "huge" not in name]
        order = {"prompt": "a red pear", "model": broken, "seed": 1}  # not every seed overflows
        answer = client.post("/hipa/generate", json=order)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "not_finite"
        assert answer.json()["error"]["type"] == "server_error"
        assert str(tmp_path) not in answer.text
        assert "--" not in answer.text
        assert "--dtype" in it.wait_for("not finite", model=broken)["reason"]
        order = {"prompt": "a red pear", "model": sound}
        assert client.post("/hipa/generate", json=order).status_code == 200
        assert [line for line in it.lines if line["event"] == "bug"] == []


def test_a_backend_that_makes_no_images_any_more_is_not_ready(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an error of CUDA that stays: here its pipeline is closed, and loaded again."""
    monkeypatch.setattr(batcher, "TRY_SECONDS", 0.05)
    name = "m"
    service = ImageService(Models([f"{name}={bundles['tiny'].root}"]), Limits())
    service.load("onnxruntime")
    (served,) = service.models.served
    assert served.pipe is not None
    assert served.batcher is not None
    again = OneStepPipeline.load(served.bundle.root, "onnxruntime")

    async def states(http: httpx.AsyncClient, until: int) -> dict[str, object]:
        for _ in range(400):
            if (await http.get("/health/ready")).status_code == until:
                break
            await asyncio.sleep(0.05)
        model = (await http.get("/hipa/models")).json()["models"][0]
        metrics = (await http.get("/metrics")).text
        gauge = next(line for line in metrics.splitlines() if line.startswith("hipa_ready "))
        return {"model": model["ready"], "gauge": gauge}

    async def ask() -> None:
        transport = httpx.ASGITransport(web_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            order = {"prompt": "a red pear", "seed": 1}
            assert (await http.post("/hipa/generate", json=order)).status_code == 200
            served.pipe.close()
            for _ in range(batcher.FAILURES):
                answer = await http.post("/hipa/generate", json=order)
                assert answer.json()["error"]["code"] == "backend_failed"
            assert await states(http, 503) == {"model": False, "gauge": "hipa_ready 0.0"}
            assert (await http.get("/health/live")).status_code == 200

            served.batcher._engine = again
            assert await states(http, 200) == {"model": True, "gauge": "hipa_ready 1.0"}
            assert (await http.post("/hipa/generate", json=order)).status_code == 200

    with caplog.at_level(logging.INFO, "hipa.serve"):
        asyncio.run(ask())
        service.close()
        again.close()
    told = [record for record in caplog.records if "backend" in record.getMessage()]
    events = [record.getMessage() for record in told if record.getMessage() != "backend failed"]
    assert events == ["backend makes no images", "backend works again"]
    assert all(record.facts["bundle"] == name for record in told if "failed" not in record.msg)


def test_an_adaptor_that_has_gone_since_the_start(tmp_path: Path) -> None:
    bundle = tiny_bundles(tmp_path)["tiny"]
    add_swaps(bundle, half=0.5)
    with (
        running(str(bundle.root), "--backend", "onnxruntime") as it,
        httpx.Client(base_url=it.url, timeout=60) as client,
    ):
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        (gone,) = [name for name in models if "half" in name]
        (sound,) = [name for name in models if "half" not in name]
        shutil.rmtree(bundle.root / "adaptors" / "half")
        answer = client.post("/hipa/generate", json={"prompt": "a red pear", "model": gone})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "backend_failed"
        assert answer.json()["error"]["type"] == "server_error"
        assert str(tmp_path) not in answer.text
        assert "half" in it.wait_for("backend failed", model=gone)["reason"]
        order = {"prompt": "a red pear", "model": sound}
        assert client.post("/hipa/generate", json=order).status_code == 200
        assert [line for line in it.lines if line["event"] == "bug"] == []


def test_a_bundle_that_has_moved_goes_on_as_it_is_loaded(tmp_path: Path) -> None:
    """Its adaptors cannot be swapped in any more, and asking for one takes nothing from others."""
    bundle = tiny_bundles(tmp_path)["tiny"]
    add_swaps(bundle, half=0.5)
    order = {"prompt": "a red pear", "seed": 1}
    with (
        running(str(bundle.root), "--backend", "onnxruntime") as it,
        httpx.Client(base_url=it.url, timeout=60) as client,
    ):
        before = client.post("/hipa/generate", json=order, headers={"accept": "image/png"})
        bundle.root.rename(tmp_path / "moved")
        broken = client.post("/hipa/generate", json={**order, "model": f"{bundle.root.name}:half"})
        assert broken.status_code == 500
        after = client.post("/hipa/generate", json=order, headers={"accept": "image/png"})
        assert after.content == before.content


def test_a_backend_without_swaps_does_not_offer_adaptors(tmp_path: Path) -> None:
    bundle = tiny_bundles(tmp_path)["tiny"]
    add_swaps(bundle, half=0.5)
    name = bundle.root.name
    with (
        running(str(bundle.root), "--backend", "openvino") as it,
        httpx.Client(base_url=it.url, timeout=60) as client,
    ):
        assert "does not swap" in it.wait_for("adaptors are not served", bundle=name)["reason"]
        for path, key in (("/v1/models", "data"), ("/hipa/models", "models")):
            assert [model["id"] for model in client.get(path).json()[key]] == [name]
        order = {"prompt": "a red pear", "model": f"{name}:half"}
        refused = client.post("/hipa/generate", json=order)
        assert refused.status_code == 400
        assert "openvino takes none" in refused.json()["error"]["message"]
        assert str(tmp_path) not in refused.text
        order = {"prompt": "a red pear", "model": name}
        assert client.post("/hipa/generate", json=order).status_code == 200


def test_uploads_that_never_end_keep_no_words_out(tmp_path: Path) -> None:
    """Of 17 forms that have begun, one is refused; what has come of the others is all there is."""
    bundle = tiny_bundles(tmp_path)["tiny"]
    head = (
        "POST /hipa/edit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    options = ("--backend", "onnxruntime", "--queue", "1", "--images", "1")
    # Not select.select: that takes no file numbers above 1,023.
    with (
        running(str(bundle.root), *options) as it,
        httpx.Client(base_url=it.url, timeout=60) as client,
        selectors.DefaultSelector() as answered,
        ExitStack() as stack,
    ):
        address = (httpx.URL(it.url).host, httpx.URL(it.url).port)
        for _ in range(LEAST_UPLOADS + 1):
            connection = stack.enter_context(socket.create_connection(address, timeout=60))
            connection.sendall(head.encode())
            answered.register(connection, selectors.EVENT_READ)
        refused = [key.fileobj for key, _ in answered.select(60)]
        answer = refused[0].recv(10_000).decode()
        assert answer.startswith("HTTP/1.1 429 ")
        assert "retry-after: 5" in answer
        time.sleep(0.5)
        assert {key.fileobj for key, _ in answered.select(0)} <= set(refused)
        order = {"prompt": "a red pear", "model": bundle.root.name}
        assert client.post("/hipa/generate", json=order).status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_disk_without_space_for_an_upload(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device /dev/full stands for the disk: the system's own error comes from it."""

    def on_the_full_disk(*arguments: object, **options: object) -> object:
        return Path("/dev/full").open("r+b", buffering=0)

    monkeypatch.setattr(tempfile, "TemporaryFile", on_the_full_disk)
    service = ImageService(Models([f"m={bundles['tiny-edit'].root}"]), Limits())
    app = web_app(service)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            files = {"image": bytes(2 << 20)}
            return await http.post("/hipa/edit", data={"prompt": "a"}, files=files)

    with caplog.at_level(logging.ERROR, "hipa.serve"):
        answer = asyncio.run(ask())
    service.close()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "upload_failed"
    (record,) = caplog.records
    assert record.getMessage() == "upload cannot be kept"
    assert "No space left on device" in record.facts["reason"]
