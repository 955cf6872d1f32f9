"""Jetson's release of Jetson Linux."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.device.jetson import l4t_release


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3"),
        ("# R35 (release), REVISION: 3.1, GCID: 32827747, BOARD: t186ref, EABI: aarch64", "35.3.1"),
        ("", None),
        ("nonsense", None),
    ],
)
def test_the_jetson_release(text, release):
    assert l4t_release(text) == release
