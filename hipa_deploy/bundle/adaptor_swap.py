"""Adaptors to swap in: files that hold another adaptor's weights for a bundle that is there already.

``adaptors/NAME/`` of a bundle, or a folder anywhere: ``swap.json``, ``weights.npz`` (the weights of one stage that
differ, under their ONNX names, in the graph's own dtype and shape) and ``reference.npy`` (what that stage gives in
PyTorch FP32 for the bundle's reference inputs). And the weight map, ``weights.json`` beside a stage's graph: which
parameter of the model each ONNX weight is. The formats are described in docs/reference/bundle.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import AdaptorInfo, Parity
from hipa_deploy.bundle.onnx_weights import check_values, read_initializers
from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import file_sha256

FOLDER, MANIFEST, WEIGHTS, REFERENCE = "adaptors", "swap.json", "weights.npz", "reference.npy"
WEIGHT_MAP = "weights.json"
_SETTING = 4  # numbers so few (the scales of a Resize, a Clip's limits) are settings of a layer to TensorRT, no weights
ADAPTED_STAGES = ("unet", "generator")  # those that hold the UNet

# How a parameter was laid out anew for the graph, and what was folded into it before.
WeightLayout = Literal["as it is", "transposed", "reshaped"]
Fold = Literal[
    "timestep", "timesteps", "encoder output", "decoder input",
    "upsampling 00", "upsampling 01", "upsampling 10", "upsampling 11",
]  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MappedWeight(_Model):
    """Where a weight of the graph comes from: parameters of the model (several, if equal), folded, then laid out.

    'unet.down_blocks.0.resnets.0.conv1.bias' is a parameter of the diffusers folder's part ``unet``, merged with the
    adaptor. ``adaptable``: an adaptor can change it (weights of linear and convolution layers, and folded biases).
    """

    places: tuple[str, ...]
    layout: WeightLayout = "as it is"
    fold: Fold | None = None
    adaptable: bool = False


class WeightMap(_Model):
    """``weights.json``: every initializer of a stage is one of ``weights`` or of ``constants``, which hold none."""

    schema_version: Literal[1] = 1
    weights: dict[str, MappedWeight]
    constants: tuple[str, ...]


def read_weight_map(bundle: Bundle, stage: str) -> WeightMap | None:
    """The weight map of ``stage``; None for a bundle that was exported without.

    Raises:
        HipaError: it is damaged.

    """
    name = (PurePosixPath(bundle.stages[stage].path).parent / WEIGHT_MAP).as_posix()
    if name not in bundle.manifest.files:
        return None
    try:
        return WeightMap.model_validate_json(bundle.path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise HipaError(
            f"{bundle.root / name} is not a weight map. Export the bundle again."
        ) from None


def refittable_weights(bundle: Bundle, stage: str) -> tuple[str, ...]:
    """Names of the ONNX weights of ``stage`` that an engine must let be refitted, for any adaptor to be swapped in.

    Those that an adaptor can change; all of floating point where the bundle has no weight map; none for a stage
    without the UNet.
    """
    if stage not in ADAPTED_STAGES:
        return ()
    if mapped := read_weight_map(bundle, stage):
        return tuple(name for name, weight in mapped.weights.items() if weight.adaptable)
    weights = read_initializers(bundle.stage_path(stage))
    return tuple(
        n
        for n, w in weights.items()
        if w.dtype.startswith("float") and math.prod(w.shape) > _SETTING
    )


class SwapManifest(_Model):
    """``swap.json``. The ``base`` hashes are of the graph it fits, ``onnx_sha256`` of the same adaptor's own export."""

    schema_version: Literal[1] = 1
    producer: str
    stage: str
    base_files: dict[str, str]
    onnx_sha256: str
    adaptor: AdaptorInfo
    parity: Parity
    weights: dict[str, MappedWeight]
    files: dict[str, str]


def check_encoder(bundle: Bundle) -> None:
    """Raise HipaError for a bundle whose adaptor is on the encoder too: a swap would leave that part in place."""
    if bundle.manifest.encoder and bundle.manifest.encoder.adaptor_sha256:
        raise HipaError(
            f"{bundle.root} has an adaptor on its encoder, which no swap takes out. Export another bundle."
        )


@dataclass(frozen=True)
class AdaptorSwap:
    """An adaptor's weights on disk, checked against the bundle they are for."""

    root: Path
    manifest: SwapManifest

    @classmethod
    def open(cls, bundle: Bundle, adaptor: str | Path) -> AdaptorSwap:
        """Open ``adaptor``, a name in the bundle's ``adaptors`` folder or a folder, and check its hashes.

        Raises:
            HipaError: no such adaptor, a damaged one, or one for another bundle.

        """
        check_encoder(bundle)
        root = find_swap(bundle, adaptor)
        try:
            manifest = SwapManifest.model_validate_json(
                (root / MANIFEST).read_text(encoding="utf-8")
            )
        except (OSError, ValidationError, ValueError):
            raise HipaError(
                f"{root}/{MANIFEST} is not of an adaptor to swap in, of this version. Run: {export_command(bundle)}"
            ) from None
        if manifest.base_files != stage_files(bundle, manifest.stage):
            raise HipaError(
                f"adaptor {root} was exported for another bundle. Run: {export_command(bundle)}"
            )
        for name, expected in manifest.files.items():
            if not (root / name).is_file() or file_sha256(root / name) != expected:
                raise HipaError(
                    f"{root / name} is missing or corrupt. Copy or export the adaptor again."
                )
        return cls(root, manifest)

    def weights(self, bundle: Bundle) -> dict[str, np.ndarray]:
        """The weights that differ from the bundle's, by ONNX name.

        Raises:
            HipaError: a weight that the graph does not have, or has in another dtype or shape.

        """
        with np.load(self.root / WEIGHTS) as stored:
            values = {name: stored[name] for name in stored.files}
        path = bundle.stage_path(self.manifest.stage)
        check_values(path, read_initializers(path), values)
        return values

    def reference(self) -> np.ndarray:
        """What the stage gives in PyTorch FP32 for the bundle's reference inputs."""
        return np.load(self.root / REFERENCE)


def find_swap(bundle: Bundle, adaptor: str | Path) -> Path:
    """The folder that ``adaptor`` names.

    Raises:
        HipaError: there is none; the message says which the bundle has.

    """
    for root in (bundle.root / FOLDER / adaptor, Path(adaptor)):
        if (root / MANIFEST).is_file():
            return root
    names = sorted(path.parent.name for path in (bundle.root / FOLDER).glob(f"*/{MANIFEST}"))
    have = (
        f"It has: {', '.join(names)}." if names else f"It has none. Run: {export_command(bundle)}"
    )
    raise HipaError(f"{bundle.root} has no adaptor {str(adaptor)!r} to swap in. {have}")


def export_command(bundle: Bundle) -> str:
    """The command that makes an adaptor fit to be swapped into ``bundle``."""
    model, root = bundle.manifest.base_model.name, bundle.root
    return (
        f"hipa-export --model {model} --adaptor FOLDER --swap-for {root} --out {root / FOLDER}/NAME"
    )


def stage_files(bundle: Bundle, stage: str) -> dict[str, str]:
    """SHA-256 of the files that hold the graph and weights of ``stage``, by name."""
    if stage not in bundle.stages:
        return {}
    onnx = bundle.stages[stage].path
    return {
        name: sha for name, sha in bundle.manifest.files.items() if name in (onnx, f"{onnx}.data")
    }


def adapted_stage(bundle: Bundle) -> str:
    """The stage that holds the UNet."""
    return next(stage for stage in ADAPTED_STAGES if stage in bundle.stages)
