"""Tries that are counted in files."""

from __future__ import annotations

from pathlib import Path

from hipa_deploy.bulk.tries import Tries


def test_tries_are_counted_until_they_end(tmp_path: Path) -> None:
    first = Tries(tmp_path)
    assert first.begin("shard-0") == 0
    # Another process goes on with the count.
    second = Tries(tmp_path)
    assert second.begin("shard-0") == 1
    assert second.begin("shard-1") == 0
    second.end("shard-0")
    assert first.begin("shard-0") == 0
    first.end("none")
