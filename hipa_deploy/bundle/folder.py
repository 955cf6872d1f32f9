"""A bundle on disk: its manifest read, its files found by name, and every one of them hashed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from hipa_deploy.bundle.manifest import Axis, Manifest, Stage
from hipa_deploy.errors import HipaError
from hipa_deploy.hashing import file_sha256

SCHEMA = 1


MANIFEST = "hipa.json"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. ``Bundle.open`` reads the manifest; ``verify`` hashes the files."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read ``root/hipa.json``.

        Raises:
            HipaError: not a bundle, a newer schema, or a manifest that does not validate.

        """
        path = root / MANIFEST
        if not root.exists():
            raise HipaError(
                f"bundle {root} does not exist. Expected a folder that hipa-export wrote, or 'emoji'."
            )
        if not path.is_file():
            raise HipaError(
                f"{root}: no {MANIFEST} in it. Expected a bundle, as hipa-export writes it."
            )
        try:
            data = json.loads(path.read_text())
            if data.get("schema_version") != SCHEMA:
                found = data.get("schema_version")
                raise HipaError(
                    f"{path}: schema {found}, this version reads {SCHEMA}. Export the bundle again."
                )
            return cls(root, Manifest.model_validate(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise HipaError(f"{path}: {where}: {first['msg']}. Export the bundle again.") from None
        except (ValueError, AttributeError) as error:
            raise HipaError(
                f"{path} is not a manifest ({error}). Export the bundle again."
            ) from None

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """The axes of all stages: batch, latent_height, latent_width, height, width, those that are not static."""
        return {
            name: axis for stage in self.manifest.stages for name, axis in stage.spec.axes.items()
        }

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Stages by name."""
        return {stage.spec.name: stage for stage in self.manifest.stages}

    def path(self, relative: str) -> Path:
        """The file ``relative`` names, which must be listed in the manifest."""
        if relative not in self.manifest.files:
            raise HipaError(
                f"{self.root}: {relative} is not listed in {MANIFEST}. Export the bundle again."
            )
        return self.root / relative

    def stage_path(self, name: str) -> Path:
        """The ONNX file of stage ``name``."""
        return self.path(self.stages[name].path)

    def verify(self) -> None:
        """Hash every listed file.

        Raises:
            HipaError: a file is missing, truncated or changed.

        """
        for relative, expected in self.manifest.files.items():
            path = self.path(relative)
            if not path.is_file():
                raise HipaError(f"{path} is missing. Export the bundle again, or copy it whole.")
            if file_sha256(path) != expected:
                raise HipaError(
                    f"{path} is corrupt: its SHA-256 is not the manifest's. Copy or export the bundle again."
                )


def latent_shape(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int, int]:
    """[C, h, w] of the latents for an image of ``height`` x ``width`` pixels; None is the bundle's own size.

    Raises:
        HipaError: the bundle does not make images of that size; the message says which it makes.

    """
    step = bundle.manifest.one_step
    asked = {"height": height, "width": width}
    sizes = {name: getattr(step, name) if size is None else size for name, size in asked.items()}
    for name, size in sizes.items():
        usual = getattr(step, name)
        allowed = bundle.axes.get(name, Axis(min=usual, opt=usual, max=usual))
        if size not in allowed:
            expected = (
                str(allowed) if name in bundle.axes else f"{usual}; export with --dynamic for more"
            )
            raise HipaError(f"{name} {size} is not a size of this bundle. Expected {expected}.")
    factor = step.height // step.latent_shape[1]
    return step.latent_shape[0], sizes["height"] // factor, sizes["width"] // factor
