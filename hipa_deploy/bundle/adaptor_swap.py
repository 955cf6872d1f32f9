"""Adaptors to swap in: files that hold another adaptor's weights for a bundle that exists.

Such an adaptor is a folder, ``adaptors/NAME/`` of a bundle or anywhere else, with three files:

- ``swap.json``: what it is, and which graph it fits.
- ``weights.npz``: the weights of one stage that differ, under their ONNX names, in the graph's own
  dtype and shape.
- ``reference.npy``: what that stage gives in PyTorch FP32 for the bundle's reference inputs.
- ``text_encoder.npz``: the text encoder's weights that differ, where LoRAs change it too. A bundle
  of SDXL in the layout generic has two text encoders, and then ``text_encoder_2.npz`` lies beside.

The weight map, ``weights.json`` beside a stage's graph, says which parameter of the model each ONNX
weight is. The formats are described in docs/reference/bundle.md.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from hipa_deploy.bundle.arrays import bounded, expect, read_npy, read_npz
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import (
    AdaptorInfo,
    FileName,
    LoraInfo,
    Parity,
    StageName,
    Text,
)
from hipa_deploy.bundle.onnx_weights import check_values, no_weight, read_initializers
from hipa_deploy.bundle.signature import check_signature
from hipa_deploy.disk.reading import (
    MAX_JSON,
    MIB,
    check_size,
    inside,
    parse_json,
    read_bytes,
    read_record,
    validated,
)
from hipa_deploy.disk.remembered import RememberedHashes, VerifiedFiles, file_marks
from hipa_deploy.errors import HipaError, brief, first_line, reason_of
from hipa_deploy.record import Record

FOLDER = "adaptors"
MANIFEST = "swap.json"
WEIGHTS = "weights.npz"
REFERENCE = "reference.npy"
TEXT_STAGE = "text_encoder"
TEXT_STAGE_2 = "text_encoder_2"  # of SDXL in the generic layout
TEXT_WEIGHTS = {TEXT_STAGE: "text_encoder.npz", TEXT_STAGE_2: "text_encoder_2.npz"}
WEIGHT_MAP = "weights.json"
# Numbers so few (the scales of a Resize, the limits of a Clip) are settings of a layer to TensorRT,
# and no weights.
_SETTING = 4
ADAPTED_STAGES = ("unet", "generator")  # those that hold the UNet

# How a parameter was laid out anew for the graph, and what was folded into it before.
WeightLayout = Literal["as it is", "transposed", "reshaped"]
Fold = Literal[
    "timestep", "timesteps", "encoder output", "decoder input",
    "upsampling 00", "upsampling 01", "upsampling 10", "upsampling 11",
]  # fmt: skip


class MappedWeight(Record):
    """Where a weight of the graph comes from.

    Attributes:
        places: the parameters of the model that it is; several, if they are equal.
            'unet.down_blocks.0.resnets.0.conv1.bias' is a parameter of the diffusers folder's part
            ``unet``, merged with the adaptor.
        layout: how it was laid out anew for the graph.
        fold: what was folded into it before that.
        adaptable: whether an adaptor can change it: weights of linear and convolution layers, and
            biases that something was folded into.

    """

    places: tuple[Text, ...] = Field(max_length=1000)
    layout: WeightLayout = "as it is"
    fold: Fold | None = None
    adaptable: bool = False


class WeightMap(Record):
    """``weights.json``: every initializer of a stage, as a weight or as a constant.

    Attributes:
        weights: initializers that come from parameters of the model, by ONNX name.
        constants: names of the others, which hold no weight.

    """

    schema_version: Literal[1] = 1
    weights: dict[str, MappedWeight]
    constants: tuple[str, ...]


def read_weight_map(bundle: Bundle, stage: str) -> WeightMap | None:
    """The weight map of ``stage``; None for a bundle that was exported without one.

    Raises:
        HipaError: it is damaged.

    """
    name = (PurePosixPath(bundle.all_stages[stage].path).parent / WEIGHT_MAP).as_posix()
    if name not in bundle.manifest.files:
        return None
    try:
        return read_record(bundle.path(name), WeightMap, "")
    except HipaError as error:
        raise HipaError(
            f"{bundle.root / name} is not a weight map ({reason_of(error)}). "
            "Export the bundle again."
        ) from None


def refittable_weights(bundle: Bundle, stage: str) -> tuple[str, ...]:
    """ONNX names of the weights of ``stage`` that an engine must keep refittable.

    These are the weights that an adaptor can change. A bundle without a weight map does not say
    which these are: then it is every weight of floating point. A stage without the UNet has none.
    """
    if stage not in ADAPTED_STAGES:
        return ()
    weight_map = read_weight_map(bundle, stage)
    if weight_map is not None:
        return tuple(name for name, weight in weight_map.weights.items() if weight.adaptable)

    names = []
    for name, weight in read_initializers(bundle.stage_path(stage)).items():
        if weight.dtype.startswith("float") and math.prod(weight.shape) > _SETTING:
            names.append(name)
    return tuple(names)


class SwappedText(Record):
    """What a swap changes in the text encoder.

    Attributes:
        base_files: SHA-256 of the files of the graph that it fits, by name.
        onnx_sha256: of the stage that an export with the same LoRAs has (``joint_sha256``).
        parity: of that stage, against PyTorch FP32.
        weights: where each weight that differs comes from, by ONNX name.

    """

    base_files: dict[FileName, str]
    onnx_sha256: str
    parity: Parity
    weights: dict[str, MappedWeight]


class SwapManifest(Record):
    """``swap.json``.

    Attributes:
        stage: the stage whose weights it changes.
        base_files: SHA-256 of the files of the graph that it fits, by name.
        onnx_sha256: of the stage that an export of the same adaptor has (``joint_sha256``).
        adaptor: the adaptor that was merged; None where LoRAs alone were.
        loras: merged before the adaptor, in this order.
        parity: of that stage, against PyTorch FP32.
        weights: where each weight that differs comes from, by ONNX name.
        text: what it changes in the text encoder; None where that stays the bundle's.
        text_2: what it changes in the stage 'text_encoder_2'; None, and left out of the file, where
            that stays the bundle's, or there is no such stage.
        files: SHA-256 of this folder's files, by name.

    """

    schema_version: Literal[1] = 1
    producer: str
    stage: StageName
    base_files: dict[FileName, str]
    onnx_sha256: str
    adaptor: AdaptorInfo | None
    loras: tuple[LoraInfo, ...] = ()
    parity: Parity
    weights: dict[str, MappedWeight]
    text: SwappedText | None = None
    text_2: SwappedText | None = None
    files: dict[FileName, str]

    @field_validator("files")
    @classmethod
    def _complete(cls, files: dict[str, str]) -> dict[str, str]:
        # A file that has no hash here would be read unchecked.
        missing = {WEIGHTS, REFERENCE} - files.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} has no hash")
        return files

    @model_validator(mode="after")
    def _text_is_complete(self) -> SwapManifest:
        for stage in self.texts:
            if TEXT_WEIGHTS[stage] not in self.files:
                raise ValueError(f"{TEXT_WEIGHTS[stage]} has no hash")
        return self

    @property
    def texts(self) -> dict[str, SwappedText]:
        """What it changes in text encoders, by stage."""
        texts = {TEXT_STAGE: self.text, TEXT_STAGE_2: self.text_2}
        return {stage: text for stage, text in texts.items() if text is not None}

    def to_json(self) -> str:
        """The text of ``swap.json``, without a field that versions before it do not know."""
        without = set() if self.text_2 else {"text_2"}
        return self.model_dump_json(indent=2, exclude=without) + "\n"


def check_encoder(bundle: Bundle) -> None:
    """Check that the bundle's adaptor is on the UNet alone.

    Raises:
        HipaError: it is on the VAE's encoder too. A swap would leave that part in place.

    """
    encoder = bundle.manifest.encoder
    if encoder and encoder.adaptor_sha256:
        raise HipaError(
            f"{bundle.root} has an adaptor on its encoder, which no swap takes out. "
            "Export another bundle."
        )


@dataclass(frozen=True)
class AdaptorSwap:
    """An adaptor's weights on disk, checked against the bundle that they are for.

    Example:
        >>> swap = AdaptorSwap.open(bundle, "night")
        >>> swap.weights(bundle)["unet.conv_in.weight"].shape
        (320, 4, 3, 3)

    """

    root: Path
    manifest: SwapManifest

    @classmethod
    def open(cls, bundle: Bundle, adaptor: str | Path, *, remembered: bool = False) -> AdaptorSwap:
        """Open an adaptor and check its hashes.

        Args:
            bundle: the bundle that it is for.
            adaptor: a name in the bundle's ``adaptors`` folder, or a folder.
            remembered: as ``Bundle.verify`` takes it.

        Raises:
            HipaError: no such adaptor, a damaged one, one for another bundle, or one that the key
                of ``HIPA_PUBLIC_KEY`` did not sign.

        """
        check_encoder(bundle)
        root = find_swap(bundle, adaptor)
        try:
            path = inside(root, MANIFEST)
            content = read_bytes(path, MAX_JSON)
            manifest = validated(SwapManifest, parse_json(content), path, "")
        except (HipaError, ValueError) as error:
            reason = reason_of(error) if isinstance(error, HipaError) else first_line(error)
            raise HipaError(
                f"{root}/{MANIFEST} is not of an adaptor to swap in, of this version "
                f"({reason}). Run: {export_command(bundle)}"
            ) from None

        check_signature(path, content)
        # The weights fit one graph alone: another has other names, shapes or layouts.
        fits = manifest.stage == adapted_stage(bundle)
        fits = fits and manifest.base_files == stage_files(bundle, manifest.stage)
        for stage, text in manifest.texts.items():
            fits = fits and stage in bundle.stages
            fits = fits and text.base_files == stage_files(bundle, stage)
        if not fits:
            raise HipaError(
                f"adaptor {root} was exported for another bundle. Run: {export_command(bundle)}"
            )
        swap = cls(root.absolute(), manifest)
        hashes = RememberedHashes(root)
        for name, expected in manifest.files.items():
            whole = (root / name).exists()
            if whole:
                check_size(inside(root, name))
                marks = file_marks(root / name)
                whole = hashes.matches(root / name, expected, again=not remembered)
                swap._verified.note(swap.root / name, marks)
            if not whole:
                raise HipaError(
                    f"{root / name} is missing or corrupt. Copy or export the adaptor again."
                )
        hashes.save()
        return swap

    @cached_property
    def _verified(self) -> VerifiedFiles:
        return VerifiedFiles()

    @property
    def stage_sha256(self) -> str:
        """What ``stage_sha256`` is of a bundle that was exported with the same adaptor."""
        manifest = self.manifest
        base = manifest.base_files.values()
        if len(base) == 1 or manifest.onnx_sha256 not in base:
            return manifest.onnx_sha256
        # Earlier versions wrote the hash of the graph alone, which all adaptors share.
        text = f"{manifest.onnx_sha256} {manifest.files[WEIGHTS]}"
        return hashlib.sha256(text.encode()).hexdigest()

    def weights(self, bundle: Bundle) -> dict[str, np.ndarray]:
        """The weights that differ from the bundle's, by ONNX name.

        Raises:
            HipaError: not a file of arrays; a weight that the graph does not have, or has in
                another dtype or shape; or other weights than the manifest says.

        """
        path = bundle.stage_path(self.manifest.stage)
        return self._read_weights(WEIGHTS, path, self.manifest.weights)

    def text_weights(self, bundle: Bundle, stage: str = TEXT_STAGE) -> dict[str, np.ndarray]:
        """A text encoder's weights that differ from the bundle's, by ONNX name; often none.

        Raises:
            HipaError: as for ``weights``.

        """
        if stage not in self.manifest.texts:
            return {}
        mapped = self.manifest.texts[stage].weights
        return self._read_weights(TEXT_WEIGHTS[stage], bundle.stage_path(stage), mapped)

    def _read_weights(
        self, file: str, path: Path, mapped: Mapping[str, MappedWeight]
    ) -> dict[str, np.ndarray]:
        """The weights in ``file``: those of the graph ``path`` that are ``mapped``."""
        initializers = read_initializers(path)
        expected = {}
        for name in mapped:
            if name not in initializers:
                raise no_weight(path, name)
            expected[name] = initializers[name].header
        size = sum(initializers[name].nbytes for name in expected)
        # Each array has a header beside its values.
        limit = size + MIB * (len(expected) + 1)
        source = inside(self.root, file)
        # With little memory it is read at every image.
        self._verified.check(source, self.manifest.files[file], "the adaptor")
        values = read_npz(source, expect(expected), max_bytes=limit)
        check_values(path, initializers, values)
        if values.keys() != expected.keys():
            raise HipaError(
                f"{self.root / file} has {len(values)} weights, {MANIFEST} says "
                f"{len(expected)}. Export the adaptor again."
            )
        return values

    def reference(self) -> np.ndarray:
        """What the stage gives in PyTorch FP32 for the bundle's reference inputs.

        Raises:
            HipaError: not an array, or one of absurd size.

        """
        array: np.ndarray = read_npy(inside(self.root, REFERENCE), bounded)
        return array


def find_swap(bundle: Bundle, adaptor: str | Path) -> Path:
    """The folder that ``adaptor`` names.

    Raises:
        HipaError: there is none; the message says which the bundle has.

    """
    if not isinstance(adaptor, str | os.PathLike):
        raise HipaError(f"the adaptor is {brief(adaptor)}. Expected a name or a folder.")
    for root in (bundle.root / FOLDER / adaptor, Path(adaptor)):
        if (root / MANIFEST).is_file():
            return root
    names = sorted(path.parent.name for path in (bundle.root / FOLDER).glob(f"*/{MANIFEST}"))
    found = f"It has: {', '.join(names)}."
    if not names:
        found = f"It has none. Run: {export_command(bundle)}"
    raise HipaError(f"{bundle.root} has no adaptor {str(adaptor)!r} to swap in. {found}")


def export_command(bundle: Bundle) -> str:
    """The command that makes an adaptor fit to be swapped into ``bundle``."""
    model = bundle.manifest.base_model.name
    root = bundle.root
    return (
        f"hipa-export --model {model} --adaptor FOLDER --swap-for {root} --out {root / FOLDER}/NAME"
    )


def stage_files(bundle: Bundle, stage: str) -> dict[str, str]:
    """SHA-256 of the files that hold the graph and weights of ``stage``, by name."""
    own = (bundle.all_stages[stage].path, *bundle.weight_files(stage))
    return {name: sha256 for name, sha256 in bundle.manifest.files.items() if name in own}


def stage_sha256(bundle: Bundle, stage: str) -> str:
    """One hash that stands for the graph and the weights of ``stage``, wherever the weights lie."""
    return joint_sha256(stage_files(bundle, stage))


def joint_sha256(files: Mapping[str, str]) -> str:
    """One hash for a graph and the files of weights beside it.

    Args:
        files: their SHA-256, by name. A graph alone, which has its weights inside, keeps its own.

    """
    if len(files) == 1:
        return next(iter(files.values()))
    # The graphs of all adaptors are equal where the weights lie beside them.
    lines = [f"{PurePosixPath(name).name} {sha256}\n" for name, sha256 in files.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def adapted_stage(bundle: Bundle) -> str:
    """The stage that holds the UNet."""
    return next(stage for stage in ADAPTED_STAGES if stage in bundle.stages)


def loaded_unet_sha256(bundle: Bundle, swap: AdaptorSwap | None) -> str:
    """The hash of the stage that holds the UNet, with the weights of ``swap`` if there is one."""
    return stage_sha256(bundle, adapted_stage(bundle)) if swap is None else swap.stage_sha256
