"""How well the invisible watermark survives, and what it costs.

Purpose: for each attack, how many watermarks are read, the bit error rate before the error
correction, and the least score of the synchronisation; the PSNR of the marked images; how often an
unmarked image is taken for a marked one; and the time of marking and reading.

Command, from the repository's root::

    python benchmarks/watermark.py [FOLDER_OF_PHOTOS] [--generated 20] [--unmarked 500]

Photos are cropped and scaled to 512 x 512. ``--generated`` adds sheets of 512 x 512 pixels that are
full of images of the embedded bundle, and as many single images of it that are enlarged to that
size. Unmarked images are random crops of the same pictures, of 256 to 512 pixels, some mirrored.

Expected time: about 2 s a picture and 0.2 s an unmarked image, on one thread of a CPU.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hipa_deploy import OneStepPipeline
from hipa_deploy.images.png import enlarge, grid
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.payload_code import encode_payload
from hipa_deploy.marks.watermark_reader import FoundWatermark, mark_readably, read_watermark

SIDE = 512
Attack = Callable[[np.ndarray], np.ndarray]


def jpeg(quality: int) -> Attack:
    def attack(image_HWC: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    return attack


def rescale(factor: float) -> Attack:
    def attack(image_HWC: np.ndarray) -> np.ndarray:
        height, width = image_HWC.shape[:2]
        size = (round(width * factor), round(height * factor))
        return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))

    return attack


def crop(share: float) -> Attack:
    """Take away ``share`` of either side, more at the left and the top than opposite."""

    def attack(image_HWC: np.ndarray) -> np.ndarray:
        height, width = image_HWC.shape[:2]
        top = round(0.7 * share * height)
        left = round(0.6 * share * width)
        bottom = height - (round(share * height) - top)
        right = width - (round(share * width) - left)
        return image_HWC[top:bottom, left:right]

    return attack


def chain(*attacks: Attack) -> Attack:
    def attack(image_HWC: np.ndarray) -> np.ndarray:
        for one in attacks:
            image_HWC = one(image_HWC)
        return image_HWC

    return attack


ATTACKS: dict[str, Attack] = {
    "none": chain(),
    "JPEG 75": jpeg(75),
    "JPEG 50": jpeg(50),
    "rescale 75 %": rescale(0.75),
    "rescale 50 %": rescale(0.5),
    "rescale 50 %, back to 100 %": chain(rescale(0.5), rescale(2)),
    "crop 5 %": crop(0.05),
    "crop 10 %": crop(0.1),
    "crop 25 %": crop(0.25),
    "rescale 50 %, JPEG 75": chain(rescale(0.5), jpeg(75)),
    "crop 5 %, rescale 75 %, JPEG 75": chain(crop(0.05), rescale(0.75), jpeg(75)),
    "crop 10 %, rescale 50 %, JPEG 75": chain(crop(0.1), rescale(0.5), jpeg(75)),
}


def photos(folder: Path) -> list[np.ndarray]:
    found = []
    for path in sorted(folder.iterdir()):
        image = Image.fromarray(read_image(path))
        fitted = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
        found.append(np.asarray(fitted))
    return found


def generated(count: int) -> list[np.ndarray]:
    """``count`` sheets of the embedded bundle's images, each with one of them enlarged."""
    found = []
    with OneStepPipeline.load("emoji") as pipe:
        across = SIDE // pipe.bundle.manifest.one_step.height
        each = across**2
        for number in range(count):
            result = pipe("3d emoji of a red apple", seed=each * number, count=each)
            found.append(sheet(result.images_BHWC, across))
            found.append(enlarge(result.images_BHWC[0], across))
    return found


def sheet(images_NHWC: np.ndarray, across: int) -> np.ndarray:
    """Images side by side without gaps, ``across`` in a row and as many rows."""
    columns = [images_NHWC[place::across] for place in range(across)]
    return grid(columns, gap=0)


def measure(name: str, images: list[np.ndarray], rng: np.random.Generator) -> None:
    """Print a table of every attack on every image."""
    payloads = [int(rng.integers(2**32)) for _ in images]
    started = time.perf_counter()
    marked = [mark_readably(*pair) for pair in zip(images, payloads, strict=True)]
    milliseconds = 1000 * (time.perf_counter() - started) / len(images)
    losses = []
    for before, after in zip(images, marked, strict=True):
        error = np.mean((before.astype(float) - after) ** 2)
        losses.append(10 * np.log10(255**2 / error))
    print(
        f"\n{name}: {len(images)} images, PSNR mean {np.mean(losses):.1f} dB, least "
        f"{np.min(losses):.1f} dB, {milliseconds:.0f} ms to mark\n"
    )
    print("| attack | read | bit error rate | least score | time to read |")
    print("|---|---|---|---|---|")
    for attack_name, attack in ATTACKS.items():
        started = time.perf_counter()
        found = [read_watermark(attack(image_HWC)) for image_HWC in marked]
        milliseconds = 1000 * (time.perf_counter() - started) / len(images)
        pairs = list(zip(found, payloads, strict=True))
        read = sum(one.payload == payload for one, payload in pairs)
        wrong = sum(one.payload not in (None, payload) for one, payload in pairs)
        rate = np.mean([bit_errors(one, payload) for one, payload in pairs])
        least = min(one.score for one in found)
        extra = f", {wrong} wrong" if wrong else ""
        print(
            f"| {attack_name} | {read} of {len(found)}{extra} | {100 * rate:.1f} % | {least:.1f} "
            f"| {milliseconds:.0f} ms |"
        )


def bit_errors(found: FoundWatermark, payload: int) -> float:
    """Share of the coded bits that were read wrong."""
    return float(np.mean((found.soft > 0) != (encode_payload(payload) > 0)))


def unmarked(images: list[np.ndarray], count: int, rng: np.random.Generator) -> None:
    """Print how often unmarked images are taken for marked ones."""
    scores = []
    taken = 0
    for _ in range(count):
        image_HWC = images[rng.integers(len(images))]
        side = int(rng.integers(256, SIDE + 1))
        top, left = rng.integers(SIDE - side + 1, size=2)
        cut_HWC = image_HWC[top : top + side, left : left + side]
        found = read_watermark(cut_HWC[:, ::-1] if rng.random() < 0.5 else cut_HWC)
        scores.append(found.score)
        taken += found.payload is not None
    print(
        f"\nunmarked: {taken} of {count} were taken for marked; scores: mean "
        f"{np.mean(scores):.2f}, most {np.max(scores):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--generated", type=int, default=0)
    parser.add_argument("--unmarked", type=int, default=500)
    options = parser.parse_args()
    if options.photos is None and not options.generated:
        parser.error("give a folder of photos, --generated, or both")
    rng = np.random.default_rng(0)
    real = photos(options.photos) if options.photos else []
    if real:
        measure("photos", real, rng)
    made = generated(options.generated)
    if made:
        measure("generated", made, rng)
    unmarked(real + made, options.unmarked, rng)


if __name__ == "__main__":
    main()
