"""The request of a measurement on COCO and its checks, which need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from hipa_deploy.disk.files import check_writable
from hipa_deploy.disk.reading import read_record
from hipa_deploy.errors import HipaError
from hipa_deploy.train.coco.coco_folder import find_sets
from hipa_deploy.train.coco.parts import ANOTHER_FOLDER, JOB, Shard
from hipa_deploy.train.coco.protocol import (
    CLIP_PREFIX,
    FETCH_PEERS_CLIP,
    INCEPTION_URL,
    RESOLUTION,
    CocoSet,
    Protocol,
    ReferenceSet,
)
from hipa_deploy.train.losses.clip_folder import check_clip_folder

MAX_RESOLUTION = 1024
MAX_BATCH = 64
REPORT_FILES = ("report.md", "report.json")


@dataclass(frozen=True)
class CocoWishes:
    """What was asked for, as on the command line.

    Attributes:
        folder: of COCO.
        inception: file of Inception's weights.
        clip: folder of CLIP; None measures no CLIP score.
        year: of the set; None is every set that is there.
        captions: 'random', 'first' or a file.
        reference: 'all' or 'captioned'.
        resolution: to which images are scaled.
        clip_prefix: put before each caption for the CLIP score.
        images: that each row generates; None is as many as the peers do.
        batch: images that are made at once.
        shard: which part of the work is done; None does all of it and writes the report.
        with_teacher: whether the multi-step model has a row.

    """

    folder: Path
    inception: Path | None = None
    clip: Path | None = None
    year: int | None = None
    captions: str = "random"
    reference: str = "all"
    resolution: int = RESOLUTION
    clip_prefix: str = CLIP_PREFIX
    images: int | None = None
    batch: int = 8
    shard: str | None = None
    with_teacher: bool = False


@dataclass(frozen=True)
class CocoRequest:
    """A request that was checked.

    Attributes:
        sets: to measure, and the output folder of each.
        inception: file of Inception's weights.
        reference: the real images.
        shard: which part of the work is done.
        report: whether the report is written at the end.

    """

    sets: dict[Path, CocoSet]
    inception: Path
    reference: ReferenceSet
    shard: Shard
    report: bool


def check_coco(wishes: CocoWishes, out: Path | None, prompts: Path | None) -> CocoRequest:
    """Check what needs no model, before anything slow.

    Args:
        wishes: what was asked for.
        out: the folder of images, features and report; with two sets, of a folder for each.
        prompts: of --prompts, which has no place here.

    Raises:
        HipaError: something is missing or out of range; the message says what to do.

    """
    # A path that is wrong is named first, even where something else is missing too.
    found = find_sets(wishes.folder, wishes.year)
    check_captions(wishes.captions)
    if wishes.clip is not None:
        check_clip_folder(wishes.clip, "--clip", FETCH_PEERS_CLIP)
    if wishes.inception is not None:
        check_inception(wishes.inception)
    if prompts is not None:
        raise HipaError("--prompts is not for --coco. Give a list of captions: --captions FILE.")
    if out is None:
        raise HipaError(
            "--coco keeps images and features in a folder, to go on after an interruption. "
            "Give one: --out FOLDER."
        )
    inception = check_inception(wishes.inception)
    reference: ReferenceSet
    if wishes.reference == "all":
        reference = "all"
    elif wishes.reference == "captioned":
        reference = "captioned"
    else:
        expected = " or ".join(get_args(ReferenceSet))
        raise HipaError(f"--reference {wishes.reference}. Expected {expected}.")
    if not 32 <= wishes.resolution <= MAX_RESOLUTION:
        raise HipaError(
            f"--resolution is {wishes.resolution}. Expected 32 to {MAX_RESOLUTION} pixels."
        )
    if not 1 <= wishes.batch <= MAX_BATCH:
        raise HipaError(f"--batch is {wishes.batch}. Expected 1 to {MAX_BATCH} images at once.")
    shard = Shard() if wishes.shard is None else Shard.parse(wishes.shard)
    check_writable(out)
    sets = {_place(out, known, alone=len(found) == 1): known for known in found}
    return CocoRequest(sets, inception, reference, shard, wishes.shard is None)


def _place(out: Path, known: CocoSet, *, alone: bool) -> Path:
    """The folder of a set: where its measurement was begun, whichever sets were there then."""
    job = out / JOB
    begun = job.is_file()
    if begun and read_record(job, Protocol, ANOTHER_FOLDER).year == known.year:
        return out
    place = out / str(known.year)
    return out if alone and not begun and not place.is_dir() else place


def check_captions(text: str) -> None:
    """Check that a list of captions is there.

    Raises:
        HipaError: it is neither a way to choose captions nor a file.

    """
    if text not in ("random", "first") and not Path(text).is_file():
        raise HipaError(
            f"--captions {text} does not exist. Expected random, first, or a text file with one "
            "caption a line."
        )


def check_inception(path: Path | None) -> Path:
    """Check that a file of Inception's weights was given.

    Raises:
        HipaError: none was given, or it is no file; the message holds the command that fetches it.

    """
    fetch = f"Fetch it, and give --inception inception-2015-12-05.pt: curl -O {INCEPTION_URL}"
    if path is None:
        raise HipaError(f"--coco needs Inception v3 for the FID, which no package has. {fetch}")
    if not path.is_file():
        raise HipaError(f"--inception {path} is no file. {fetch}")
    return path
