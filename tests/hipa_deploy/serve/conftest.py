"""One server of tiny bundles of every task, for all tests of the service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hipa_deploy.bundle.folder import Bundle
from tests.served import Server, add_swaps, running, tiny_bundles


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A bundle of each task; the one to generate has two adaptors."""
    made = tiny_bundles(tmp_path_factory.mktemp("bundles"))
    add_swaps(made["tiny"], half=0.5, double=2.0)
    return made


@pytest.fixture(scope="session")
def server(bundles: dict[str, Bundle]) -> Iterator[Server]:
    """All of them behind one server."""
    roots = [str(bundle.root) for bundle in bundles.values()]
    with running(*roots, "--backend", "onnxruntime", "--body-limit", "1") as it:
        yield it
        # Whatever the tests sent, nothing was a bug and nothing was printed past the log.
        assert [line for line in it.lines if line["event"] == "bug"] == []
        assert it.other == []
