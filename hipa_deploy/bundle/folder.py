"""A bundle on disk: its manifest is read, its files are found by name, and each of them is hashed.

The format is described in docs/reference/bundle.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from hipa_deploy.bundle.manifest import Axis, Manifest, Stage
from hipa_deploy.bundle.onnx_check import beside, external_files
from hipa_deploy.bundle.signature import check_signature
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import (
    MIB,
    check_size,
    inside,
    lies_in,
    parse_json,
    read_bytes,
    shown,
    validated,
)
from hipa_deploy.disk.remembered import RememberedHashes, VerifiedFiles, file_marks
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError, RequestError, first_line, reason_of, whole_number

SCHEMA = 1
MANIFEST = "hipa.json"
_MAX_MANIFEST = 4 * MIB


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    ``Bundle.open`` reads the manifest alone, which is quick. ``verify`` hashes every file.

    Example:
        >>> bundle = Bundle.open("my-bundle")
        >>> bundle.verify()
        >>> list(bundle.stages)
        ['text_encoder', 'unet', 'vae_decoder']

    """

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path) -> Bundle:
        """Read ``root/hipa.json``.

        Args:
            root: the bundle's folder, or 'emoji' for the embedded bundle.

        Raises:
            HipaError: not a bundle, a newer schema, a manifest that does not validate, or one that
                the key of ``HIPA_PUBLIC_KEY`` did not sign.

        """
        root = resolve_bundle(root)
        path = root / MANIFEST
        if not root.exists():
            raise HipaError(
                f"bundle {root} does not exist. "
                "Expected a folder that hipa-export wrote, or 'emoji'."
            )
        if root.is_file():
            raise HipaError(
                f"{root} is a file. Expected a bundle's folder, as hipa-export writes it, or "
                "'emoji'."
            )
        if not path.exists():
            raise HipaError(
                f"{root}: no {MANIFEST} in it. Expected a bundle, as hipa-export writes it."
            )
        try:
            content = read_bytes(inside(root, MANIFEST), _MAX_MANIFEST)
        except HipaError as error:
            raise HipaError(
                f"{path} is not a manifest ({reason_of(error)}). Export the bundle again."
            ) from None
        check_signature(path, content)
        try:
            data = parse_json(content)
        except ValueError as error:
            raise HipaError(
                f"{path} is not a manifest ({first_line(error)}). Export the bundle again."
            ) from None
        if not isinstance(data, dict):
            raise HipaError(f"{path} is not a manifest (no table). Export the bundle again.")
        # First the schema: of another one, every field's error would be beside the point.
        found = data.get("schema_version")
        if found != SCHEMA:
            raise HipaError(
                f"{path}: schema {shown(str(found))}, this version reads {SCHEMA}. {_remedy(data)}"
            )
        bundle = cls(root, validated(Manifest, data, path, _remedy(data)))
        # Of the manifest that was read: the file may be another one when the hash is asked for.
        bundle.__dict__["sha256"] = hashlib.sha256(content).hexdigest()
        return bundle

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """The axes of all stages that are not static.

        Their names are batch, latent_height, latent_width, height and width.
        """
        axes: dict[str, Axis] = {}
        for stage in self.manifest.stages:
            axes |= stage.spec.axes
        return axes

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in the order in which they run; a safety checker is the last."""
        stages = dict(self.path_stages)
        if self.manifest.safety is not None:
            stage = self.manifest.safety.stage
            stages[stage.spec.name] = stage
        return stages

    @cached_property
    def path_stages(self) -> dict[str, Stage]:
        """The stages that lead from a prompt to an image, without the safety checker."""
        return {stage.spec.name: stage for stage in self.manifest.stages}

    @cached_property
    def all_stages(self) -> dict[str, Stage]:
        """The stages by name; the last is the base UNet, in a bundle that refines."""
        refine = self.manifest.refine
        return self.stages | ({refine.stage.spec.name: refine.stage} if refine else {})

    @cached_property
    def sha256(self) -> str:
        """Of the manifest, which lists the hash of every other file: it names the bundle."""
        return file_sha256(self.root / MANIFEST)

    def path(self, relative: str) -> Path:
        """The file that ``relative`` names.

        Raises:
            HipaError: the manifest does not list it, so its content is not vouched for; or it is
                missing, no regular file, or a link that leads out of the bundle.

        """
        self._require_listed(relative)
        return inside(self.root, relative)

    def _require_listed(self, relative: str) -> None:
        if relative not in self.manifest.files:
            raise HipaError(
                f"{self.root}: {shown(relative)} is not listed in {MANIFEST}. "
                "Export the bundle again."
            )

    def stage_path(self, name: str) -> Path:
        """The ONNX file of stage ``name``."""
        return self.path(self.all_stages[name].path)

    def verify(self, *, remembered: bool = False) -> None:
        """Hash every file that the manifest lists, and check that a stage reads no other.

        Args:
            remembered: take the hash of an unchanged file from this user's cache, as
                ``hipa_deploy.disk.remembered`` says. By default every file is read.

        Raises:
            HipaError: a file is missing, truncated or changed, lies outside the bundle, or has
                weights in a file that is not listed.

        """
        # Every file is there, and none is absurd, before the first is hashed.
        for relative in self.manifest.files:
            check_size(self.path(relative))
        hashes = RememberedHashes(self.root)
        for relative, expected in self.manifest.files.items():
            path = self.path(relative)
            marks = file_marks(path)
            if not hashes.matches(path, expected, again=not remembered):
                raise HipaError(
                    f"{path} is corrupt: its SHA-256 is not the manifest's. "
                    "Copy or export the bundle again."
                )
            self._verified.note(path, marks)
        hashes.save()
        for name, stage in self.all_stages.items():
            for location in sorted(external_files(self.stage_path(name))):
                weights = beside(stage.path, location)
                if weights not in self.weight_files(name):
                    self._require_listed(weights)
                    raise HipaError(
                        f"{self.stage_path(name)} has weights in {shown(location)}, outside its "
                        "folder. Export the bundle again."
                    )

    def check_unchanged(self, stage: str) -> None:
        """Check that the files of a stage, which is opened again, are those that were verified.

        Raises:
            HipaError: a file is missing, or has another content.

        """
        for relative in (self.all_stages[stage].path, *self.weight_files(stage)):
            expected = self.manifest.files[relative]
            self._verified.check(self.path(relative), expected, "the bundle")

    @cached_property
    def _verified(self) -> VerifiedFiles:
        return VerifiedFiles()

    def weight_files(self, stage: str) -> list[str]:
        """The listed files in the folder of ``stage`` that can hold its weights, sorted.

        These are all but the graph itself, and JSON files such as the weight map.
        """
        graph = self.all_stages[stage].path
        folder = PurePosixPath(graph).parent.as_posix()
        names = []
        for name in sorted(self.manifest.files):
            if lies_in(name, folder) and name != graph and not name.endswith(".json"):
                names.append(name)
        return names


def _remedy(data: Mapping[str, Any]) -> str:
    """What to do about a manifest that cannot be used.

    An export with the version that wrote it could give the same manifest again.
    """
    writer = data.get("producer")
    if not isinstance(writer, str):
        return "Export the bundle again."
    return f"It was written by {shown(writer)}. Use that version, or export it again with this one."


def latent_shape(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int, int]:
    """[C, h, w] of the latents for an image of ``height`` x ``width`` pixels.

    Args:
        bundle: the bundle that makes the image.
        height: pixels; None is the bundle's own height.
        width: pixels; None is the bundle's own width.

    Raises:
        HipaError: the bundle does not make images of that size; the message says which it makes.

    Example:
        >>> latent_shape(bundle, 512, None)
        (4, 64, 64)

    """
    step = bundle.manifest.one_step
    if height is None:
        height = step.height
    if width is None:
        width = step.width
    height = whole_number(height, "height")
    width = whole_number(width, "width")
    _check_size(bundle, "height", height, step.height)
    _check_size(bundle, "width", width, step.width)
    pixels_a_latent = step.height // step.latent_shape[1]
    return step.latent_shape[0], height // pixels_a_latent, width // pixels_a_latent


def _check_size(bundle: Bundle, name: str, size: int, own: int) -> None:
    """Raise HipaError unless the axis ``name`` may have ``size``; a static one has one size."""
    axis = bundle.axes.get(name)
    if size == own if axis is None else size in axis:
        return
    known = str(own if axis is None else axis)
    expected = f"{known}; export with --dynamic for more" if axis is None else known
    raise RequestError(
        f"{name} {size} is not a size of this bundle. Expected {expected}.",
        argument=name,
        told=f"{name} {size} is not a size of this model. Expected {known}.",
        owner="export it for other sizes",
    )
