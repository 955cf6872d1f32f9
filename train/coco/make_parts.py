"""Make the parts of a job: images where they are missing, then their features.

Shapes: B images of a batch, S side of the square in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from hipa_deploy.disk.files import write_file
from hipa_deploy.interrupts import raise_interruption
from hipa_deploy.marks.image_file import encode_image
from hipa_deploy.train.coco.clip_score import ClipScore
from hipa_deploy.train.coco.entries import Entry
from hipa_deploy.train.coco.inception import Inception
from hipa_deploy.train.coco.parts import Parts, Shard
from hipa_deploy.train.coco.prepare_images import read_squares
from hipa_deploy.train.evaluation.rivals import Maker
from hipa_deploy.train.loop.progress_bar import ProgressBar

INCEPTION_BATCH = 25  # divides a part
Advance = Callable[[int], None]
"""Tells the progress bar how many more images are done."""


@dataclass
class Measure:
    """The networks that look at images, loaded when they are first needed.

    Attributes:
        inception: file of Inception's weights.
        clip: folder of CLIP; None measures no CLIP score.
        side: of the square that images are cropped and scaled to.
        clip_prefix: put before each caption.
        device: where the networks run.

    """

    inception: Path
    clip: Path | None
    side: int
    clip_prefix: str
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    _inception: Inception | None = None
    _clip: ClipScore | None = None

    def load(self) -> None:
        """Load the networks, unless they are.

        Raises:
            HipaError: one cannot be loaded.

        """
        if self._inception is None:
            self._inception = Inception(self.inception, self.device)
        if self._clip is None and self.clip is not None:
            self._clip = ClipScore(self.clip, self.device, self.clip_prefix)

    def __call__(
        self, paths: Sequence[Path], captions: Sequence[str] | None
    ) -> dict[str, np.ndarray]:
        """What the report needs of some images.

        Args:
            paths: N files.
            captions: of generated images; None for real ones, which get no CLIP score.

        Returns:
            'features' float32 [N, 2048], and 'clip' float32 [N] where there is a CLIP.

        Raises:
            HipaError: an image cannot be read, or a network cannot be loaded.

        """
        self.load()
        assert self._inception is not None
        features = []
        cosines = []
        done = 0
        for squares_BSS3 in read_squares(paths, self.side, INCEPTION_BATCH):
            features.append(self._inception(squares_BSS3))
            if captions is not None and self._clip is not None:
                texts = captions[done : done + len(squares_BSS3)]
                cosines.append(self._clip(squares_BSS3, texts))
            done += len(squares_BSS3)
        found = {"features": np.concatenate(features)}
        if cosines:
            found["clip"] = np.concatenate(cosines)
        return found


def make_reference(
    parts: Parts, paths: Sequence[Path], measure: Measure, shard: Shard, console: Console
) -> None:
    """Compute what is missing of the real images' features."""

    def make(part: int, _: Advance) -> dict[str, np.ndarray]:
        return measure([paths[number] for number in parts.images_of(part)], None)

    _make_missing(f"real images, {parts.count:,}", parts, shard, console, make)


def make_row(
    entry: Entry,
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    measure: Measure,
    *,
    batch: int,
    shard: Shard,
    console: Console,
) -> None:
    """Make what is missing of a row: its images, then their features.

    Args:
        entry: the row.
        parts: where it is kept.
        prompts: N prompts.
        seeds: the noise seed of each.
        measure: computes the features.
        batch: images that are made at once.
        shard: which of the parts are this process's.
        console: where the progress is shown.

    Raises:
        HipaError: a model cannot be loaded, or an image not be read.

    """
    maker: Maker | None = None

    def make(part: int, advance: Advance) -> dict[str, np.ndarray]:
        nonlocal maker
        numbers = parts.images_of(part)
        captions = [prompts[number] for number in numbers]
        if entry.open is None:
            return measure([entry.files[number] for number in numbers], captions)
        missing = [number for number in numbers if not parts.image_path(number).is_file()]
        for start in range(0, len(missing), batch):
            # Loaded when it is needed: a job that is merged has all of its images.
            maker = maker or entry.open()
            some = missing[start : start + batch]
            texts = [prompts[number] for number in some]
            images = maker(texts, [seeds[number] for number in some])
            for number, image_HWC in zip(some, images, strict=True):
                parameters = {"prompt": prompts[number], "seed": seeds[number]}
                write_file(parts.image_path(number), encode_image(image_HWC, parameters))
            raise_interruption()
            advance(len(some))
        return measure([parts.image_path(number) for number in numbers], captions)

    _make_missing(entry.row, parts, shard, console, make)


def _make_missing(
    name: str,
    parts: Parts,
    shard: Shard,
    console: Console,
    make: Callable[[int, Advance], dict[str, np.ndarray]],
) -> None:
    """Make and write the missing parts of this process, with a progress bar.

    Images move the bar when they are made, and what was there before when its part is done.
    """
    missing = parts.missing(shard)
    if not missing:
        return
    own = [part for part in parts.parts if shard.has(part)]
    total = sum(len(parts.images_of(part)) for part in own)
    left = sum(len(parts.images_of(part)) for part in missing)
    with ProgressBar(console) as progress:
        task = progress.add_task(name, total=total, completed=total - left)
        done = total - left
        for part in missing:
            parts.write(part, make(part, partial(progress.advance, task)))
            done += len(parts.images_of(part))
            progress.update(task, completed=done)
