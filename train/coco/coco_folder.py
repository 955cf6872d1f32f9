"""MS-COCO on disk: captions and real images, in the layout of its archives. Needs no torch.

``annotations/captions_val2014.json`` lists images and captions
(https://cocodataset.org/#format-data, Image Captioning); ``val2014/`` has the images.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from hipa_deploy.disk.reading import MIB, name_problem, read_json, read_text, validated
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import MAX_CHARACTERS, one_line
from hipa_deploy.train.coco.protocol import SETS, Captions, CocoSet, ReferenceSet

MAX_ANNOTATIONS = 512 * MIB  # that of val2014 has 32 MB
MAX_LIST = 64 * MIB
MAX_ENTRIES = 2_000_000
SEED = 0  # of the draw of images and captions


class _Image(BaseModel):
    id: int
    file_name: str = Field(max_length=500)


class _Caption(BaseModel):
    id: int
    image_id: int
    caption: str = Field(max_length=MAX_CHARACTERS)


class _Annotations(BaseModel):
    """What is read of the file; it has licences and addresses besides."""

    images: Annotated[list[_Image], Field(max_length=MAX_ENTRIES)]
    annotations: Annotated[list[_Caption], Field(max_length=MAX_ENTRIES)]


@dataclass(frozen=True)
class CocoData:
    """What one row of a table is made of.

    Attributes:
        known: which set it is.
        captions: N captions, the prompts.
        chosen: how they were chosen.
        real: files of the real images, sorted by the images' numbers.

    """

    known: CocoSet
    captions: list[str]
    chosen: Captions
    real: list[Path]

    @property
    def captions_sha256(self) -> str:
        """Hash of the captions, one a line."""
        return _lines_sha256(self.captions)

    @property
    def real_sha256(self) -> str:
        """Hash of the real images' names, one a line."""
        return _lines_sha256([path.name for path in self.real])


def find_sets(folder: Path, year: int | None) -> list[CocoSet]:
    """The sets that a folder holds.

    Args:
        folder: of ``annotations`` and the images.
        year: 2014 or 2017; None is every set that is there.

    Raises:
        HipaError: there is no such year, or the folder does not hold it.

    """
    if year is not None and year not in SETS:
        raise HipaError(f"--year is {year}. Expected 2014 or 2017.")
    if not folder.is_dir():
        raise HipaError(
            f"--coco {folder} does not exist. Expected a folder with annotations and the images "
            "of COCO."
        )
    wanted = [SETS[year]] if year is not None else list(SETS.values())
    found = [known for known in wanted if (folder / "annotations" / known.captions).is_file()]
    if not found:
        known = wanted[-1]
        raise HipaError(
            f"--coco {folder} has no annotations/{known.captions}. Expected that file and the "
            f"folder {known.folder} beside annotations. Fetch and unpack them there: "
            f"{known.downloads}"
        )
    return found


def read_coco(
    folder: Path,
    known: CocoSet,
    *,
    captions: str = "random",
    reference: ReferenceSet = "all",
    images: int | None = None,
) -> CocoData:
    """Read a set, and choose captions and real images.

    Args:
        folder: of ``annotations`` and the images.
        known: which set.
        captions: 'random' or 'first' of each image's; or a text file, one caption a line, whose
            order and repetitions are kept.
        reference: which real images: 'all', or those that are 'captioned'.
        images: how many captions, at least 4; None is as many as the peers take, or as there are.

    Raises:
        HipaError: a file is missing or damaged, there are fewer captions than images, or
            ``captioned`` was asked for with captions of a file, which name no images.

    """
    path = folder / "annotations" / known.captions
    remedy = f"Fetch it again: {known.downloads}"
    content = read_json(path, max_bytes=MAX_ANNOTATIONS, remedy=remedy)
    table = validated(_Annotations, content, path, remedy)
    if len({image.id for image in table.images}) != len(table.images):
        raise HipaError(f"{path}: two images have one id. {remedy}")
    by_image = _captions_by_image(table, path, remedy)

    chosen: Captions
    if captions in ("random", "first"):
        chosen = "random" if captions == "random" else "first"
        drawn = _draw_images(sorted(by_image), known, images)
        texts = _choose(by_image, drawn, chosen)
    elif reference == "captioned":
        raise HipaError(
            f"--reference captioned: the captions of {captions} name no images. "
            "Leave out --captions, or --reference."
        )
    else:
        chosen = "file"
        drawn = []
        texts = _from_file(Path(captions), known, images)

    kept = {image.id for image in table.images} if reference == "all" else set(drawn)
    real = []
    for image in sorted(table.images, key=lambda image: image.id):
        if image.id not in kept:
            continue
        problem = name_problem(image.file_name)
        if problem:
            raise HipaError(f"{path}: the name of image {image.id} {problem}. {remedy}")
        real.append(folder / known.folder / image.file_name)
    missing = [file.name for file in real if not file.is_file()]
    if missing:
        raise HipaError(
            f"{folder / known.folder} lacks {len(missing)} of {len(real)} images that {path.name} "
            f"lists, the first of them {missing[0]}. Unpack {known.folder}.zip again."
        )
    if len(real) < 2:
        raise HipaError(f"{path} lists {len(real)} images. Expected at least 2.")
    return CocoData(known, texts, chosen, real)


def _captions_by_image(table: _Annotations, path: Path, remedy: str) -> dict[int, list[str]]:
    """The captions of each image, by their own ids; of each image that has any."""
    named = {image.id for image in table.images}
    found: dict[int, list[str]] = {}
    for entry in sorted(table.annotations, key=lambda entry: entry.id):
        if entry.image_id not in named:
            raise HipaError(
                f"{path}: caption {entry.id} is of an image that is not listed. {remedy}"
            )
        text = one_line(entry.caption)
        if text:
            found.setdefault(entry.image_id, []).append(text)
    return found


def _draw_images(ids: list[int], known: CocoSet, images: int | None) -> list[int]:
    """Which images give their captions; all of them in their order, if as many are wanted."""
    count = min(known.count, len(ids)) if images is None else images
    _check_count(count, len(ids), f"images of {known.folder} with captions")
    if count == len(ids):
        return ids
    return sorted(random.Random(SEED).sample(ids, count))


def _choose(by_image: dict[int, list[str]], drawn: list[int], chosen: Captions) -> list[str]:
    if chosen == "first":
        return [by_image[number][0] for number in drawn]
    generator = random.Random(SEED)
    return [generator.choice(by_image[number]) for number in drawn]


def _from_file(path: Path, known: CocoSet, images: int | None) -> list[str]:
    """The first captions of a text file; unlike other prompts, equal ones are kept."""
    if not path.is_file():
        raise HipaError(
            f"--captions {path} does not exist. Expected random, first, or a text file with one "
            "caption a line."
        )
    texts = []
    for line in read_text(path, max_bytes=MAX_LIST).split("\n"):
        text = one_line(line)
        if len(text) > MAX_CHARACTERS:
            raise HipaError(
                f"--captions {path} has a line of {len(text)} characters. "
                f"Expected at most {MAX_CHARACTERS}."
            )
        if text:
            texts.append(text)
    count = min(known.count, len(texts)) if images is None else images
    _check_count(count, len(texts), f"captions in {path}")
    return texts[:count]


def _check_count(count: int, there: int, what: str) -> None:
    if count < 4:
        raise HipaError(f"number of images: {count}. Expected at least 4.")
    if count > there:
        raise HipaError(f"--images {count}: there are {there} {what}. Ask for fewer.")


def _lines_sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
