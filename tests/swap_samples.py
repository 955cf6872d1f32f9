"""Adaptor swaps made by hand: some of the embedded bundle's own weights, scaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hipa_deploy.bundle.adaptor_swap import (
    MANIFEST,
    REFERENCE,
    WEIGHTS,
    MappedWeight,
    SwapManifest,
    adapted_stage,
    stage_files,
)
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import AdaptorInfo, Parity
from hipa_deploy.bundle.onnx_weights import read_initializers
from hipa_deploy.disk.hashing import file_sha256

INFO = AdaptorInfo(name="night", sha256="1" * 64, rank=4, alpha=4.0, scale=1.0)
PARITY = Parity(max_abs=0.0, mean_abs=0.0, cosine=1.0, psnr_db=99.0)


def scaled_weights(bundle: Bundle, factor: float, count: int = 3) -> dict[str, np.ndarray]:
    """Return the first ``count`` convolution kernels of the UNet's stage, times ``factor``."""
    weights = read_initializers(bundle.stage_path(adapted_stage(bundle)))
    kernels = [weight for weight in weights.values() if len(weight.shape) == 4][:count]
    scaled = {}
    for weight in kernels:
        values = weight.read()
        scaled[weight.name] = values * values.dtype.type(factor)
    return scaled


def write_swap(
    bundle: Bundle, out: Path, weights: dict[str, np.ndarray], **changes: object
) -> Path:
    """Write the folder that ``hipa-export --swap-for`` would write for some weights."""
    out.mkdir(parents=True)
    np.savez(out / WEIGHTS, **weights)  # type: ignore[arg-type]
    np.save(out / REFERENCE, np.zeros(1, np.float32))
    stage = adapted_stage(bundle)
    manifest = SwapManifest(
        producer="tests",
        stage=stage,
        base_files=stage_files(bundle, stage),
        onnx_sha256="2" * 64,
        adaptor=INFO,
        parity=PARITY,
        weights={name: MappedWeight(places=(f"unet.{name}",), adaptable=True) for name in weights},
        files={name: file_sha256(out / name) for name in (WEIGHTS, REFERENCE)},
    )
    (out / MANIFEST).write_text(manifest.model_copy(update=changes).model_dump_json())
    return out
