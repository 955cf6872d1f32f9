"""A folder of images as a row of a report: which file belongs to which prompt. Needs no torch."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import one_line
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.read_marks import is_image_file, read_marks
from hipa_deploy.train.data.captions import TABLES, folder_captions, image_paths, sidecar

# '12.png', '000012.png', and '012-seed1000012.png' as hipa-generate writes it.
_NUMBER = re.compile(r"(\d+)(-seed\d+)?")


@dataclass(frozen=True)
class FoundImages:
    """The files of a row's images.

    Attributes:
        paths: N files, in the order of the prompts.
        same_noise: whether every file says that it was made of its row's own seed.
        notes: what a reader of the report should know, a sentence each.

    """

    paths: list[Path]
    same_noise: bool
    notes: list[str]

    def images(self, height: int, width: int) -> np.ndarray:
        """The images, uint8 [N, H, W, 3].

        Raises:
            HipaError: one cannot be read, or has another size.

        """
        images = []
        for path in self.paths:
            image_HWC = read_image(path)
            if image_HWC.shape[:2] != (height, width):
                raise HipaError(
                    f"{path} has {image_HWC.shape[0]}x{image_HWC.shape[1]} pixels (height x "
                    f"width). Expected {height}x{width}, as the model makes them: resizing would "
                    "change the high frequencies that are measured."
                )
            images.append(image_HWC)
        return np.stack(images)


def find_images(folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> FoundImages:
    """Find the image of each prompt.

    With captions in the folder (``hipa_deploy.train.data.captions`` says how) an image belongs to
    the prompt that is its caption; of a prompt that occurs several times the images are taken in
    the order of their names. Without captions the name is the prompt's number, from 0 on.

    Args:
        folder: of the images.
        prompts: N prompts.
        seeds: the noise seed of each.

    Raises:
        HipaError: a prompt has no image; two images have one number; or a file says that it shows
            another prompt.

    Example:
        >>> find_images(Path("theirs"), ["a red apple", "a boat"], [0, 1]).paths
        [PosixPath('theirs/0.png'), PosixPath('theirs/1.png')]

    """
    paths = image_paths(folder)
    if _has_captions(folder, paths):
        found = _by_caption(folder, paths, prompts)
        note = "Its images are found by their captions."
    else:
        found = _by_number(folder, paths, prompts)
        note = "Its images are found by their numbers."
    if len(paths) > len(found):
        note += f" {len(paths) - len(found)} others in the folder are not used."
    same_noise, noise_note = _noise(found, prompts, seeds)
    return FoundImages(found, same_noise, [note, noise_note])


def _has_captions(folder: Path, paths: Sequence[Path]) -> bool:
    if any(any(folder.rglob(name)) for name in TABLES):
        return True
    # The first image alone may lack a caption.
    return any(sidecar(path) for path in paths)


def _by_caption(folder: Path, paths: list[Path], prompts: Sequence[str]) -> list[Path]:
    captions = folder_captions(folder, paths, Console(file=io.StringIO()))
    left = defaultdict(list)
    for path, caption in zip(paths, captions, strict=True):
        left[one_line(caption)].append(path)
    found = []
    for number, prompt in enumerate(prompts):
        images = left[one_line(prompt)]
        if not images:
            raise HipaError(
                f"images {folder}: none is left for prompt {number}, {prompt!r}. Expected an image "
                f"with this caption for each of the {len(prompts)} images: add them, or lower "
                "--images."
            )
        found.append(images.pop(0))
    return found


def _by_number(folder: Path, paths: list[Path], prompts: Sequence[str]) -> list[Path]:
    numbered: dict[int, Path] = {}
    for path in paths:
        match = _NUMBER.fullmatch(path.stem)
        if match is None:
            continue
        number = int(match[1])
        if number in numbered:
            raise HipaError(
                f"images {folder}: {numbered[number].name} and {path.name} have one number. "
                "Expected one image for each prompt."
            )
        numbered[number] = path
    missing = [number for number in range(len(prompts)) if number not in numbered]
    if missing:
        raise HipaError(
            f"images {folder}: no image for {len(missing)} of {len(prompts)} prompts, the first of "
            f"them {missing[0]}, {prompts[missing[0]]!r}. Expected {missing[0]}.png, counted from "
            f"0, or captions: {TABLES[0]} or {TABLES[1]} with file_name and text."
        )
    return [numbered[number] for number in range(len(prompts))]


def _noise(paths: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int]) -> tuple[bool, str]:
    """Whether the files say the rows' own seeds, and a sentence about it."""
    known = 0
    same = 0
    for number, path in enumerate(paths):
        parameters = read_marks(path).parameters if is_image_file(path) else None
        if parameters is None:
            continue
        prompt = parameters.get("prompt")
        if isinstance(prompt, str) and one_line(prompt) != one_line(prompts[number]):
            raise HipaError(
                f"{path} was made of the prompt {prompt!r}, and its place is that of "
                f"{prompts[number]!r}. Name the images by the prompts' numbers."
            )
        known += "seed" in parameters
        same += parameters.get("seed") == seeds[number]
    if same == len(paths):
        return True, "Its files say the same seeds as the other rows'."
    if known == len(paths):
        return False, "Its files say other seeds than the other rows': no paired distance."
    return False, "Its files do not say their seeds: no paired distance."
