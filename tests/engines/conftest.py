from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.bundle.folder import Bundle
from tests.engines.engine_samples import save_conv, write_bundle


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """A bundle with ``stages``: 'unet', and 'vae_decoder' with external data."""

    def make(
        dtype: type = np.float16,
        precision: str = "fp16",
        op: str = "Relu",
        stages: tuple[str, ...] = (),
    ) -> Bundle:
        for stage in stages or ("unet", "vae_decoder"):
            save_conv(
                tmp_path / "bundle" / stage / "model.onnx",
                dtype,
                op,
                external=stage == "vae_decoder",
            )
        return write_bundle(tmp_path / "bundle", precision)

    return make
