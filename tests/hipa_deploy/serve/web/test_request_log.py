"""The lines of requests are written a moment later, and none is lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from hipa_deploy.serve.serve_metrics import ServeMetrics
from hipa_deploy.serve.web.request_log import RequestLog

SCOPE = {"type": "http", "method": "POST", "path": "/hipa/generate"}


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def wait(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(60)


async def receive() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def send(message: Any) -> None:
    pass


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "hipa.serve")
    return caplog


def statuses(lines: pytest.LogCaptureFixture) -> list[int]:
    return [record.facts["status"] for record in lines.records]  # type: ignore[attr-defined]


def test_lines_wait_and_come_together(lines: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        log = RequestLog(answer, ServeMetrics())
        for _ in range(2):
            await log(dict(SCOPE), receive, send)
        assert statuses(lines) == []
        await asyncio.sleep(0.1)
        assert statuses(lines) == [200, 200]
        # And again: the writer of the first two has ended.
        await log(dict(SCOPE), receive, send)
        await asyncio.sleep(0.1)
        assert statuses(lines) == [200, 200, 200]

    asyncio.run(ask())


def test_the_loop_may_end_at_once(lines: pytest.LogCaptureFixture) -> None:
    asyncio.run(RequestLog(answer, ServeMetrics())(dict(SCOPE), receive, send))
    assert statuses(lines) == [200]


def test_a_request_that_is_cancelled_has_its_line(lines: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        log = RequestLog(wait, ServeMetrics())
        asyncio.get_running_loop().create_task(log(dict(SCOPE), receive, send))
        await asyncio.sleep(0)

    # The loop cancels what is left, and waits for nothing that begins then.
    asyncio.run(ask())
    assert statuses(lines) == [0]
