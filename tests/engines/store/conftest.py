from __future__ import annotations

import pytest

from hipa_deploy.engines.store import select
from tests.engines.engine_samples import ORIN


@pytest.fixture
def on_orin(monkeypatch):
    """A machine with Orin's GPU and TensorRT 10.13.3, as far as the choice of an engine sees."""

    class Trt:
        __version__ = "10.13.3"

    monkeypatch.setattr(select, "find_gpu", lambda: ORIN)
    monkeypatch.setattr(select, "load_tensorrt", lambda library: Trt)
