from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.train.loop.scalars import Scalars


def test_failing_to_close_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full_disk)
    with pytest.raises(HipaError, match="the cause"), Scalars(tmp_path, 0):
        raise HipaError("the cause")
    with pytest.raises(OSError, match="No space"), Scalars(tmp_path, 0):
        pass


def test_without_a_folder_nothing_is_recorded() -> None:
    with Scalars(None, 0) as scalars:
        scalars.add({"loss": 1.0}, 1)
    assert scalars.writer is None
