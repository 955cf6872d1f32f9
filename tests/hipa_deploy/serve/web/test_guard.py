"""Who is let in: hosts, origins, keys, and bodies that do not arrive. Without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hipa_deploy.serve.arrivals import Arrivals
from hipa_deploy.serve.web import guard as guard_module
from hipa_deploy.serve.web.api_errors import ApiError
from hipa_deploy.serve.web.guard import Guard, check_names

KEY = "0123456789abcdef"


class App:
    """Reads the body and answers 200; keeps what went wrong."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Any = None

    async def __call__(self, scope, receive, send) -> None:
        self.calls += 1
        try:
            more = True
            while more:
                more = (await receive()).get("more_body", False)
        except Exception as error:
            self.error = error
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(
    guard: Guard, headers: dict[str, str] | list, *, method: str = "POST", path: str = "/v1/models",
    body: bytes = b"{}", delay: float = 0.0,
) -> tuple[int, dict]:  # fmt: skip
    """The status and the body of an answer."""
    listed = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": "http", "scheme": "http", "method": method, "path": path,
        "headers": [(key.encode(), value.encode("latin-1")) for key, value in listed],
    }  # fmt: skip
    sent: list[dict] = []

    async def receive() -> dict:
        await asyncio.sleep(delay)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    if not sent:
        return 0, {}
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content) if content else {}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
        ("192.168.1.7:80", 200), ("gpu-box:8000", 200), ("GPU-box", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421), ("", 421), ("[::1", 421), ("gpu-box.", 421),
    ],
)  # fmt: skip
def test_hosts(host: str, status: int) -> None:
    app = App()
    got, answer = ask(Guard(app, hosts=["gpu-box"], body=1000), {"host": host})
    assert got == status
    assert app.calls == (status == 200)
    if status != 200:
        assert answer["error"]["code"] == "unknown_host"


def test_a_load_balancer_asks_for_the_health_without_a_host() -> None:
    """As HAProxy's httpchk in HTTP/1.0 does; a name that is given must still be known."""
    for path in ("/health/live", "/health/ready"):
        assert ask(Guard(App(), body=1000), {}, method="GET", path=path)[0] == 200
        evil = {"host": "evil.example"}
        assert ask(Guard(App(), body=1000), evil, method="GET", path=path)[0] == 421
    assert ask(Guard(App(), body=1000), {}, method="GET", path="/metrics")[0] == 421


def test_names_that_a_request_can_have() -> None:
    check_names(["gpu-box", "GPU.local", "gpu_box.", "*", "192.168.1.2", "[::1]"], [])
    origins = ["https://example.org/", "http://localhost:3000", "http://[::1]:80", "null"]
    check_names([], [*origins, "chrome-extension://abc"])


@pytest.mark.parametrize("given", ["https://Friend.example:443/", "https://friend.example"])
def test_an_origin_is_known_as_browsers_send_it(given: str) -> None:
    headers = {"host": "localhost:8000", "origin": "https://friend.example"}
    assert ask(Guard(App(), origins=[given], body=1000), headers)[0] == 200


def test_a_request_without_or_with_two_hosts() -> None:
    assert ask(Guard(App(), body=1000), {})[0] == 421
    two = [("host", "localhost"), ("host", "localhost")]
    assert ask(Guard(App(), body=1000), two)[0] == 400


def test_all_hosts_on_request() -> None:
    assert ask(Guard(App(), hosts=["*"], body=1000), {"host": "any.example"})[0] == 200


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({}, "POST", 200),
        ({"origin": "http://localhost:8000"}, "POST", 200),
        ({"origin": "https://friend.example"}, "POST", 200),
        ({"origin": "http://localhost:3000"}, "POST", 403),
        ({"origin": "https://localhost:8000"}, "POST", 403),
        ({"origin": "https://evil.example"}, "POST", 403),
        ({"origin": "null"}, "POST", 403),
        ({"origin": "https://evil.example"}, "GET", 403),
        ({"sec-fetch-site": "cross-site"}, "POST", 403),
        ({"sec-fetch-site": "same-site"}, "GET", 403),
        ({"sec-fetch-site": "same-origin"}, "POST", 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "GET", 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "POST", 403),
    ],
)
def test_pages_of_other_sites(headers: dict, method: str, status: int) -> None:
    guard = Guard(App(), origins=["https://friend.example/"], body=1000)
    got, _ = ask(guard, {"host": "localhost:8000", **headers}, method=method)
    assert got == status


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("gpu-box", "https://gpu-box", 200),
        ("GPU-Box", "HTTPS://gpu-box", 200),
        ("gpu-box:8443", "https://gpu-box:8443", 200),
        ("gpu-box", "http://gpu-box", 200),
        ("gpu-box", "https://gpu-box:8443", 403),
        ("gpu-box", "https://gpu-box.evil.example", 403),
        ("gpu-box", "https://evil.example", 403),
        ("gpu-box", "ftp://gpu-box", 403),
        ("gpu-box", "null", 403),
        # DNS rebinding: the owner does not know that name.
        ("evil.example", "https://evil.example", 421),
        # Programs of this machine that have pages of their own.
        ("localhost", "https://localhost", 403),
        ("127.0.0.1:8000", "https://127.0.0.1:8000", 403),
        ("[::1]", "https://[::1]", 403),
        ("192.168.1.7", "https://192.168.1.7", 403),
        ("localhost", "https://gpu-box", 403),
        ("127.0.0.1", "https://gpu-box", 403),
    ],
)
def test_the_page_behind_a_proxy_with_tls(host: str, origin: str, status: int) -> None:
    guard = Guard(App(), hosts=["gpu-box", "other"], body=1000)
    assert ask(guard, {"host": host, "origin": origin})[0] == status


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("any.example", "https://any.example", 200),
        ("any.example", "https://evil.example", 403),
        ("localhost", "https://localhost", 403),
        ("localhost.", "https://localhost.", 403),
        ("a.localhost", "https://a.localhost", 403),
        ("127.0.0.1", "https://127.0.0.1", 403),
    ],
)
def test_the_page_behind_a_proxy_that_checks_names(host: str, origin: str, status: int) -> None:
    guard = Guard(App(), hosts=["*"], body=1000)
    assert ask(guard, {"host": host, "origin": origin})[0] == status


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_name_of_this_machine_has_no_tls(host: str) -> None:
    guard = Guard(App(), hosts=[host], body=1000)
    assert ask(guard, {"host": host, "origin": f"https://{host}"})[0] == 403
    assert ask(guard, {"host": host, "origin": f"http://{host}"})[0] == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401), ("", 401), ("Bearer ", 401), (f"Bearer {KEY}x", 401), (f"Basic {KEY}", 401),
        (KEY, 401), (f"Bearer {KEY[:-1]}", 401), ("Bearer \xff", 401),
        (f"Bearer {KEY}", 200), (f"bearer  {KEY} ", 200), ("Bearer another-of-sixteen", 200),
    ],
)  # fmt: skip
def test_keys(authorization: str | None, status: int) -> None:
    guard = Guard(App(), keys=[KEY, "another-of-sixteen"], body=1000)
    headers = {"host": "localhost"}
    if authorization is not None:
        headers["authorization"] = authorization
    got, answer = ask(guard, headers)
    assert got == status
    if status == 401:
        assert answer["error"]["code"] == "invalid_api_key"
        assert KEY not in json.dumps(answer)
    for path, expected in (("/health/ready", 200), ("/health/live", 200), ("/metrics", 401)):
        assert ask(guard, {"host": "localhost"}, method="GET", path=path)[0] == expected


def test_a_form_may_be_larger_than_json() -> None:
    guard = Guard(App(), body=3 << 20)
    length = {"host": "localhost", "content-length": str(2 << 20)}
    assert ask(guard, length)[0] == 413
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert ask(guard, {**length, **form})[0] == 200


def test_a_body_that_grows_too_large() -> None:
    app = App()
    status, answer = ask(Guard(app, body=10), {"host": "localhost"}, body=b"a" * 11)
    assert (status, answer["error"]["code"], app.calls) == (413, "request_too_large", 0)


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.05)
    app = App()
    status, answer = ask(Guard(app, body=10), {"host": "localhost"}, delay=5)
    assert (status, answer["error"]["code"], app.calls) == (408, "request_timeout", 0)


def test_a_body_that_comes_slowly_has_more_time_the_more_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large upload over a slow line is no trickle."""
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(guard_module, "BODY_RATE", 1000)
    assert status_of_parts(1000 * [b""]) == 408
    assert status_of_parts(10 * [bytes(100)]) == 200


def status_of_parts(parts: list[bytes]) -> int:
    """The answer's status for a body of which a part comes every 50 ms."""
    statuses: list[int] = []

    async def app(scope, receive, send) -> None:
        try:
            while (await receive())["more_body"]:
                pass
            statuses.append(200)
        except ApiError as error:
            statuses.append(error.status_code)

    async def receive() -> dict:
        await asyncio.sleep(0.05)
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict) -> None:
        pass

    scope = {
        "type": "http", "scheme": "http", "method": "POST", "path": "/hipa/generate",
        "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    asyncio.run(Guard(app, body=1 << 20)(scope, receive, send))
    return statuses[0]


def test_requests_on_their_way_to_the_queue_take_its_places() -> None:
    """Of a crowd that comes at once, only as many come in as the queue has places."""
    scopes: list[dict] = []
    statuses: list[int] = []

    async def app(scope, receive, send) -> None:
        assert (await receive())["body"] == b"{}", "what the guard read is given again"
        scopes.append(scope)
        await asyncio.sleep(3600)

    async def send(message: dict) -> None:
        statuses.append(message.get("status", 0))

    async def run() -> None:
        arrivals = Arrivals(lambda arriving: None if arriving < 2 else 7)
        guard = Guard(app, body=100, arrivals=arrivals)

        def come(more: bool = False) -> asyncio.Task:
            async def receive() -> dict:
                return {"type": "http.request", "body": b"{}", "more_body": more}

            scope = {
                "type": "http", "scheme": "http", "method": "POST", "path": "/hipa/generate",
                "headers": [(b"host", b"localhost")],
            }  # fmt: skip
            return asyncio.create_task(guard(scope, receive, send))

        slow = [come(more=True) for _ in range(3)]
        crowd = [come() for _ in range(4)]
        await asyncio.sleep(0.05)
        assert (len(scopes), statuses.count(429)) == (5, 2), "slow clients keep nobody out"

        scopes[-1]["queued"]()
        crowd.append(come())
        await asyncio.sleep(0.05)
        assert (len(scopes), statuses.count(429)) == (6, 2), "the queue counts that one itself"

        crowd[0].cancel()
        await asyncio.sleep(0.05)
        crowd.append(come())
        await asyncio.sleep(0.05)
        assert (len(scopes), statuses.count(429)) == (7, 2), "one that has gone frees its place"
        for task in slow + crowd:
            task.cancel()

    asyncio.run(run())


def test_bodies_on_their_way_are_counted() -> None:
    """What has come of each is in memory or on the disk, and a slow one comes for minutes."""
    scopes: list[dict] = []
    answers: list[dict] = []

    async def app(scope, receive, send) -> None:
        scopes.append(scope)
        await asyncio.sleep(3600)

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            answers.append(message)

    async def run() -> None:
        guard = Guard(app, body=100, uploads=2)

        def come(method: str = "POST", *, more: bool = True) -> asyncio.Task:
            parts = [{"type": "http.request", "body": b"--x", "more_body": more}]

            async def receive() -> dict:
                return parts.pop() if parts else {"type": "http.disconnect"}

            form = b"multipart/form-data; boundary=x"
            scope = {
                "type": "http", "scheme": "http", "method": method, "path": "/hipa/edit",
                "headers": [(b"host", b"localhost"), (b"content-type", form)],
            }  # fmt: skip
            return asyncio.create_task(guard(scope, receive, send))

        tasks = [come() for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (len(scopes), [answer["status"] for answer in answers]) == (2, [429])
        assert (b"retry-after", b"5") in answers[0]["headers"]
        tasks += [come(more=False), come("GET")]
        await asyncio.sleep(0.05)
        assert len(scopes) == 4, "what has come whole is no upload"

        scopes[0]["queued"]()
        tasks += [come(), come()]
        await asyncio.sleep(0.05)
        assert (len(scopes), len(answers)) == (5, 2), "the queue counts the first"

        tasks[1].cancel()
        await asyncio.sleep(0.05)
        tasks.append(come())
        await asyncio.sleep(0.05)
        assert (len(scopes), len(answers)) == (6, 2), "one that has gone frees its place"
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_a_client_that_takes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "ANSWER_SECONDS", 0.05)
    sent = []

    async def run() -> None:
        async def receive() -> dict:
            return {"type": "http.request"}

        async def send(message: dict) -> None:
            sent.append(message["type"])
            await asyncio.sleep(5)

        scope = {
            "type": "http", "scheme": "http", "method": "GET", "path": "/",
            "headers": [(b"host", b"localhost")],
        }  # fmt: skip
        await asyncio.wait_for(Guard(App(), body=10)(scope, receive, send), 2)

    asyncio.run(run())
    assert sent == ["http.response.start"]
