"""``hipa-build``: mistakes are refused before anything is built."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji"], "--backend"),
        (["nope", "--backend", "rtx"], "bundle nope does not exist"),
        (["emoji", "--backend", "rtx", "--target", "rtx99"], "target 'rtx99' is unknown"),
        (["emoji", "--backend", "rtx", "--workspace", "-1"], "workspace_mib is -1"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("build", *arguments)
