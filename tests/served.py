"""Tiny bundles whose batches hold up to eight images, and a running ``hipa-serve``."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hipa_deploy.bundle.folder import Bundle
from tests.swap_samples import INFO, scaled_weights, write_swap

LARGEST = 8  # images of a batch
ARCHIVES = ("tiny_bundles.zip", "tiny_control.zip")
LOADED = 120.0  # seconds until a server of tiny bundles must be ready, on a busy machine


def tiny_bundles(folder: Path) -> dict[str, Bundle]:
    """The bundles of tests/tiny_bundles.zip and tiny_control.zip, by name: one of each task."""
    for name in ARCHIVES:
        with zipfile.ZipFile(Path(__file__).parent / name) as archive:
            archive.extractall(folder)
    return {path.name: Bundle.open(path) for path in sorted(folder.iterdir())}


def add_swaps(bundle: Bundle, **factors: float) -> None:
    """Give a bundle adaptors to swap in: its own weights, scaled."""
    for name, factor in factors.items():
        info = INFO.model_copy(update={"sha256": name, "name": name})
        weights = scaled_weights(bundle, factor)
        write_swap(bundle, bundle.root / "adaptors" / name, weights, adaptor=info)


class Server:
    """A ``hipa-serve`` in a process of its own.

    Args:
        process: that was started.

    Attributes:
        lines: what it has written to its log, parsed.
        url: where it listens.

    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._new: queue.Queue[None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for("listening")["url"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.other.append(line)
            self._new.put(None)

    def wait_for(self, event: str, **facts: Any) -> dict[str, Any]:
        """The first line of the log with an event and such facts; waits for it."""
        deadline = time.monotonic() + LOADED
        while True:
            for line in list(self.lines):
                if line["event"] == event and facts.items() <= line.items():
                    return line
            assert self.process.poll() is None, self.other
            assert time.monotonic() < deadline, (event, self.lines, self.other)
            try:
                self._new.get(timeout=0.1)
            except queue.Empty:
                continue

    def wait_until_ready(self) -> None:
        """Until every bundle has made its first image."""
        deadline = time.monotonic() + LOADED
        while self.status("/health/ready") != 200:
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)

    def status(self, path: str) -> int:
        """The status of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; give the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        return code


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Server]:
    """A server that is ready, on a free port."""
    command = [sys.executable, "-m", "hipa_deploy", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        server = Server(process)
        server.wait_until_ready()
        yield server
    finally:
        process.kill()
        process.wait()
