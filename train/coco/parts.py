"""The parts of a job on disk: images and features that were made are never made again.

A row of the table has a folder. In it are images by their numbers, and a file of features for each
part of ``PART`` images. The name of the folder has a hash of everything that the images depend on,
so that nothing stale is found. The real images' features have a folder of their own.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.bundle.arrays import expect, read_npz
from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.reading import MIB, read_record
from hipa_deploy.errors import HipaError, reason_of
from hipa_deploy.train.coco.protocol import FEATURES, Protocol

PART = 100  # images
JOB = "coco.json"
ANOTHER_FOLDER = "Choose another --out, or the options that it was begun with."
REFERENCE = "reference"
FLOAT = np.dtype(np.float32)
MAX_PART = 16 * MIB  # of a part's arrays; 100 images have 0.8


@dataclass(frozen=True)
class Shard:
    """One of several processes that share a job.

    Attributes:
        number: of this one, from 0.
        count: how many there are.

    """

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard in ``NUMBER/COUNT``.

        Raises:
            HipaError: it is something else.

        Example:
            >>> Shard.parse("0/4")
            Shard(number=0, count=4)

        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise HipaError(
                f"--shard {text}. Expected NUMBER/COUNT with the number from 0 on and below the "
                "count, such as 0/4."
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, part: int) -> bool:
        """Whether a part belongs to this process."""
        return part % self.count == self.number


@dataclass(frozen=True)
class Parts:
    """The features of a set of images, in parts on disk.

    Attributes:
        folder: of the parts.
        count: images of the set.

    """

    folder: Path
    count: int

    @property
    def parts(self) -> range:
        """The numbers of all parts."""
        return range(-(-self.count // PART))  # rounded up

    def images_of(self, part: int) -> range:
        """The numbers of a part's images."""
        return range(part * PART, min((part + 1) * PART, self.count))

    def path(self, part: int) -> Path:
        """The file of a part. Where it exists, it is whole."""
        return self.folder / f"part-{part:05d}.npz"

    def image_path(self, number: int) -> Path:
        """The file of a generated image."""
        return self.folder / "images" / f"{number:06d}.png"

    def missing(self, shard: Shard = Shard()) -> list[int]:
        """The parts that this process has still to make."""
        return [part for part in self.parts if shard.has(part) and not self.path(part).is_file()]

    def write(self, part: int, values: Mapping[str, np.ndarray]) -> None:
        """Write a part: an array by each name, with a row for each of its images."""
        buffer = io.BytesIO()
        save: Any = np.savez  # its stub takes the names for its own options
        save(buffer, **values)
        write_file(self.path(part), buffer.getvalue())

    def read(self, name: str) -> np.ndarray:
        """The arrays of one name, of all parts in their order.

        Args:
            name: 'features', or 'clip' where a CLIP score was measured.

        Raises:
            HipaError: a part is missing or damaged, or has other arrays than its images need.

        """
        arrays = []
        for part in self.parts:
            path = self.path(part)
            count = len(self.images_of(part))
            known = expect({"features": (FLOAT, (count, FEATURES)), "clip": (FLOAT, (count,))})
            try:
                found = read_npz(path, known, max_bytes=MAX_PART)
            except HipaError as error:
                reason = reason_of(error).removesuffix("Export it again").rstrip()
                raise HipaError(f"{reason} Remove it, and run the command again.") from None
            if name not in found:
                raise HipaError(f"{path} has no {name}. Remove it, and run the command again.")
            arrays.append(found[name])
        return np.concatenate(arrays)


def begin_job(out: Path, protocol: Protocol) -> None:
    """Record a job in its folder; a folder that has one must have this one.

    Raises:
        HipaError: the folder holds another job, or other files.

    """
    path = out / JOB
    if path.is_file():
        before = read_record(path, Protocol, ANOTHER_FOLDER)
        for name in Protocol.model_fields:
            then = getattr(before, name)
            now = getattr(protocol, name)
            if then != now:
                raise HipaError(f"{out} holds another measurement: its {name} was {then}, now it "
                                f"is {now}. {ANOTHER_FOLDER}")  # fmt: skip
        return
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise HipaError(f"{out} is not empty, and holds no measurement on COCO. {ANOTHER_FOLDER}")
    content = json.dumps(protocol.model_dump(mode="json"), indent=2) + "\n"
    write_file(path, content.encode())


def row_folder(out: Path, row: str, identity: Mapping[str, Any]) -> Path:
    """The folder of a row, named after it and after a hash of what its images depend on."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")[:60]
    return out / f"{name}-{digest[:12]}"
