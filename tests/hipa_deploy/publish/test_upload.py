"""The upload, with huggingface_hub's own client and a server that answers as the hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT  # the client reads addresses of this host alone

from hipa_deploy.errors import HipaError
from hipa_deploy.publish.hub import upload

HEAD = "1" * 40


class Hub(ThreadingHTTPServer):
    """A repository me/one-step. Every file is taken in the commit itself, without LFS."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.existing: list[str] = [".gitattributes"]
        self.private: bool | None = None
        self.files: dict[str, bytes] = {}
        self.parent: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        siblings = [{"rfilename": name} for name in self.server.existing]
        self.answer({"id": "me/one-step", "sha": HEAD, "siblings": siblings, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            # From 1.0 on huggingface_hub has a word for it.
            wanted = json.loads(body)
            self.server.private = wanted.get("private", wanted.get("visibility") == "private")
            self.answer({"url": f"{ENDPOINT}/me/one-step"})
        elif path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self.answer({"files": modes})
        else:
            self.take_commit(body)

    def take_commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.parent = value.get("parentCommit")
            else:
                self.server.files[value["path"]] = base64.b64decode(value["content"])
        address = f"{ENDPOINT}/me/one-step/commit/{'2' * 40}"
        self.answer({"success": True, "commitOid": "2" * 40, "commitUrl": address})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    (out / "scheduler").mkdir(parents=True)
    (out / "README.md").write_text("---\ntags: [hipa]\n---\n# A card\n")
    (out / "scheduler" / "scheduler_config.json").write_text("{}")
    (out / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    return out


def api_of(address: str) -> HfApi:
    return HfApi(endpoint=address, token="hf_test")


def test_every_file_arrives_in_one_commit(hub: Hub, folder: Path) -> None:
    address = upload(folder, "me/one-step", private=True, force=False, api=api_of(hub.address))
    assert address.endswith("/me/one-step/commit/" + "2" * 40)
    assert hub.private is True
    assert hub.parent == HEAD
    expected = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert hub.files == expected


def test_a_card_that_is_there_needs_force(hub: Hub, folder: Path) -> None:
    hub.existing.append("README.md")
    api = api_of(hub.address)
    with pytest.raises(HipaError, match=r"has a README.md already. Add --force"):
        upload(folder, "me/one-step", private=False, force=False, api=api)
    assert hub.files == {}
    upload(folder, "me/one-step", private=False, force=True, api=api)
    assert "README.md" in hub.files


def test_a_hub_that_cannot_be_reached(folder: Path) -> None:
    api = api_of("http://127.0.0.1:9")
    with pytest.raises(HipaError, match=r"me/one-step cannot be uploaded: .*HF_TOKEN"):
        upload(folder, "me/one-step", private=False, force=False, api=api)
