"""A Hugging Face hub of one repository on this machine, as far as huggingface_hub asks it.

The client reads its address, HF_ENDPOINT, when it is imported: it runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def serve_repository(
    root: Path, name: str, refusal: tuple[int, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of ``root`` as the repository ``name``.

    Args:
        root: of the files.
        name: owner/name.
        refusal: the code and the hub's word that every request is answered with; None for none.

    Yields:
        The address, and the names of the files that were fetched so far.

    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = f"/{name}/resolve/"
            if refusal is not None:
                self._answer(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
                return
            if path.startswith(f"/api/models/{name}"):
                self._answer(200, json.dumps(_api(root, name, path)).encode())
                return
            wanted = path.removeprefix(files).partition("/")[2]
            if not path.startswith(files) or not (root / wanted).is_file():
                self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            content = (root / wanted).read_bytes()
            if self.command == "GET":
                fetched.append(wanted)
            tag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()


def _api(root: Path, name: str, path: str) -> object:
    files = sorted(file for file in root.rglob("*") if file.is_file())
    names = [file.relative_to(root).as_posix() for file in files]
    if "/tree/" in path:
        sizes = [file.stat().st_size for file in files]
        pairs = zip(names, sizes, strict=True)
        return [{"type": "file", "path": one, "size": size, "oid": COMMIT} for one, size in pairs]
    return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in names]}
