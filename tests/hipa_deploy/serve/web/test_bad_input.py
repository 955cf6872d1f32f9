"""Hostile and broken requests against a running service: an error of the API, and no bug."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.served import Server

JSON = {"content-type": "application/json"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of a refusal in the API's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "Traceback" not in answer.text
    # Whoever asks has no options of a command.
    assert "--" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"prompt": NaN}', "invalid_json"),
        (b'{"prompt": "a", "seed": Infinity}', "invalid_json"),
        (b'{"prompt": "a", "seed": 1e400}', "invalid_value"),
        (b"[" * 500_000, "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"prompt": 3}', "invalid_value"),
        (b'{"prompt": ["a"]}', "invalid_value"),
        (b'{"prompt": ""}', "invalid_value"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "a", "seed": 1.5}', "invalid_value"),
        (b'{"prompt": "a", "seed": true}', "invalid_value"),
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "invalid_value"),
        (b'{"prompt": "a", "seed": 9223372036854775807, "n": 2}', "invalid_value"),
        (b'{"prompt": "a", "model": {"a": 1}}', "invalid_value"),
        (b'{"prompt": "a", "model": "' + b"m" * 999 + b'"}', "invalid_value"),
        (b'{"prompt": "a", "size": "\\u0661\\u0662x\\u0663\\u0662"}', "invalid_value"),
        (b'{"seed": 3}', "missing_required_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_json_that_is_wrong(http: httpx.Client, content: bytes, code: str) -> None:
    answer = http.post("/v1/images/generations", content=content, headers=JSON)
    refused(answer, 400, code)


def test_the_value_that_is_wrong_is_not_sent_back(http: httpx.Client) -> None:
    body = {"prompt": {"secret": "correct horse"}}
    assert "horse" not in http.post("/hipa/generate", json=body).text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_json(http: httpx.Client, kind: str) -> None:
    """A form of another site's page can send these kinds without asking the server first."""
    answer = http.post("/hipa/generate", content=b'{"prompt":"a"}', headers={"content-type": kind})
    refused(answer, 415, "unsupported_content_type")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(http: httpx.Client) -> None:
    body = {"prompt": "a" * 100 * MIB}
    started = time.perf_counter()
    answer = http.post("/hipa/generate", json=body)
    refused(answer, 413, "request_too_large")
    assert time.perf_counter() - started < 20


def test_a_body_of_unknown_length_is_counted(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * MIB

    answer = http.post("/hipa/generate", content=chunks(), headers=JSON)
    refused(answer, 413, "request_too_large")


def test_a_client_that_leaves_in_the_middle_of_its_body(server: Server) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /hipa/generate HTTP/1.1\r\nHost: localhost\r\n"
            b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"prom'
        )
    server.wait_for("request", error="client_closed")


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /hipa/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /hipa/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\n",
    ],
    ids=lambda head: repr(head[:60]),
)
def test_what_is_no_http(server: Server, head: bytes) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(head)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    first, _, body = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body.split(b"\r\n")[-1])["error"]["type"] == "invalid_request_error"


def test_headers_that_are_too_large(server: Server, http: httpx.Client) -> None:
    refused(http.get("/v1/models", headers={"x": "a" * 50_000}), 431, "headers_too_large")

    # Nor are they read until they end.
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 64 * 1024)
        assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_nothing_of_a_request_becomes_a_header(http: httpx.Client) -> None:
    prompt = "pear\r\nx-injected: 1"
    answer = http.post(
        "/hipa/generate",
        json={"prompt": prompt, "model": "tiny", "seed": 3},
        headers={"accept": "image/png"},
    )
    assert answer.status_code == 200
    assert "x-injected" not in answer.headers
    answer = http.get("/v1/models/a%0d%0ax-injected:%201")
    refused(answer, 404, "model_not_found")
    assert "x-injected" not in answer.headers


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../tiny", "tiny/../tiny", "tiny:../half", "tiny:", "tiny\x00", "TINY"]
)
def test_a_models_name_is_never_a_path(http: httpx.Client, name: str) -> None:
    answer = http.post("/hipa/generate", json={"prompt": "a", "model": name})
    message = refused(answer, 404, "model_not_found")
    assert "passwd" not in message


def test_paths_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    refused(http.get("/../../etc/passwd"), 404, "not_found")
    refused(http.get("/docs"), 404, "not_found")
    refused(http.get("/v1/images/generations"), 405, "method_not_allowed")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png(width: int = 32, height: int = 32, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        (b"", "no PNG, JPEG or WebP", "invalid_image_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG", "invalid_image_format"),
        (b"<html><script>alert(1)</script></html>", "no PNG, JPEG", "invalid_image_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no PNG", "invalid_image_format"),
        (b"GIF89a" + b"\0" * 50, "no PNG, JPEG or WebP", "invalid_image_format"),
        (png()[:300], "the image cannot be read", "image_parse_error"),
        (bomb(30_000, 30_000), "too many pixels", "image_too_large"),
        (bomb(5000, 5000), "5000x5000 pixels", "image_too_large"),
        (bomb(2000, 2000), "the image cannot be read", "image_parse_error"),
        (png(3, 3), "at least 4 pixels each way", "image_too_small"),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/images/edits", "tiny-edit"),
        ("/hipa/edit", "tiny-edit"),
        ("/hipa/control", "tiny-control"),
    ],
)
def test_files_that_are_no_images(
    http: httpx.Client, path: str, model: str, content: bytes, words: str, code: str
) -> None:
    answer = http.post(
        path,
        data={"prompt": "a", "model": model},
        files={"image": ("a.png", content, "image/png")},
    )
    message = refused(answer, 400, code)
    assert answer.json()["error"]["param"] == "image"
    assert words in message
    assert "/" not in message.replace("48/", ""), "no path of the server"


EDIT = "/hipa/edit"
INPAINT = "/hipa/inpaint"
CONTROL = "/hipa/control"
OPENAI = "/v1/images/edits"
BOTH = ["image", "mask"]


@pytest.mark.parametrize(
    ("path", "data", "files", "code", "param"),
    [
        (EDIT, {"strength": "nan"}, ["image"], "invalid_value", "strength"),
        (EDIT, {"strength": "1e999"}, ["image"], "invalid_value", "strength"),
        (EDIT, {"strength": "0.3"}, ["image"], "invalid_value", "strength"),
        (EDIT, {}, ["image", "image"], "invalid_value", "image"),
        (EDIT, {}, BOTH, "unknown_parameter", "mask"),
        (EDIT, {"image": "apple.png"}, BOTH, "invalid_value", "image"),
        (OPENAI, {"image[]": "apple.png"}, ["mask"], "invalid_value", "image[]"),
        (INPAINT, {"mask": "apple.png"}, ["image"], "invalid_value", "mask"),
        (INPAINT, {}, ["image"], "missing_required_parameter", "mask"),
        (INPAINT, {}, ["mask"], "missing_required_parameter", "image"),
        (INPAINT, {"feather": "-1"}, BOTH, "invalid_value", "feather"),
        (INPAINT, {"match": "a little"}, BOTH, "invalid_value", "match"),
        (CONTROL, {"scale": "nan"}, ["image"], "invalid_value", "scale"),
        (CONTROL, {"scale": "-0.1"}, ["image"], "invalid_value", "scale"),
        (CONTROL, {"scale": "2.1"}, ["image"], "invalid_value", "scale"),
        (CONTROL, {"scale": "strong"}, ["image"], "invalid_value", "scale"),
        (CONTROL, {"strength": "0.5"}, ["image"], "unknown_parameter", "strength"),
        (CONTROL, {"height": "48"}, ["image"], "invalid_value", "height"),
        (CONTROL, {}, [], "missing_required_parameter", "image"),
        (CONTROL, {}, BOTH, "unknown_parameter", "mask"),
        (CONTROL, {"model": "tiny-edit"}, ["image"], "invalid_value", "model"),
        (EDIT, {"scale": "1"}, ["image"], "unknown_parameter", "scale"),
        (EDIT, {"model": "tiny-control"}, ["image"], "invalid_value", "model"),
        (OPENAI, {"model": "tiny-control"}, ["image"], "invalid_value", "model"),
        (OPENAI, {"model": "tiny-edit"}, BOTH, "invalid_value", "mask"),
        (OPENAI, {"model": "tiny-inpaint"}, ["image"], "invalid_mask", "image"),
        (OPENAI, {}, ["image"], "missing_required_parameter", "model"),
        (OPENAI, {"model": "tiny"}, ["image"], "invalid_value", "model"),
        (OPENAI, {"n": "many"}, ["image"], "invalid_value", "n"),
    ],
)
def test_forms_that_are_wrong(
    http: httpx.Client, path: str, data: dict, files: list, code: str, param: str | None
) -> None:
    # Each field is a part: without a file httpx would send another kind of form.
    parts = [(name, (None, value)) for name, value in {"prompt": "a", **data}.items()]
    parts += [(name, ("a.png", png(), "image/png")) for name in files]
    answer = http.post(path, files=parts)
    refused(answer, 400, code)
    assert answer.json()["error"]["param"] == param


def test_forms_that_are_broken(http: httpx.Client) -> None:
    head = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x", b"garbage", b"--x\r\n\r\n\r\n--x--", b"--x\r\n" * 1000):
        answer = http.post("/hipa/edit", content=content, headers=head)
        assert answer.status_code == 400, content
        refused(answer, 400, answer.json()["error"]["code"])
    refused(
        http.post("/hipa/edit", content=b"a", headers={"content-type": "multipart/form-data"}),
        400,
        "invalid_form",
    )
    many = [("image", (f"{i}.png", b"a", "image/png")) for i in range(30)]
    refused(http.post("/hipa/edit", files=many), 400, "invalid_form")


def test_a_form_that_is_too_large(http: httpx.Client) -> None:
    files = {"image": ("a.png", b"\0" * 2 * MIB, "image/png")}
    refused(http.post("/hipa/edit", data={"prompt": "a"}, files=files), 413, "request_too_large")


def test_the_log_has_no_prompt_and_no_path(http: httpx.Client, server: Server) -> None:
    http.post("/hipa/generate", json={"prompt": "a very private pear", "model": "tiny"})
    http.get("/a/very/private/path?key=secret")
    server.wait_for("request", status=404)
    text = json.dumps(server.lines)
    assert "private" not in text
    assert "secret" not in text
    assert "traceback" not in text
