"""How the peers measure FID and CLIP score on MS-COCO, each choice with its source.

The FID-30k of GigaGAN, DMD2 and SwiftBrush v2 is one procedure, and their code is public:

- https://github.com/mingukkang/GigaGAN, evaluation/evaluation.py and data_util.py
- https://github.com/tianweiy/DMD2, main/coco_eval/coco_evaluator.py, experiments/sdv1.5/README.md
- SwiftBrush v2, eval/fid.py and eval/clip_score.py, read in https://github.com/PhiHoc/SwiftBrushV2

For the FID-5k on COCO 2017 that HiPA, InstaFlow and ADD print, no code was found. The same
procedure is used there. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hipa_deploy.record import Record

Captions = Literal["random", "first", "file"]
ReferenceSet = Literal["all", "captioned"]

RESOLUTION = 256  # GigaGAN and DMD2: --eval_res 256
CLIP_PREFIX = "A photo depicts "  # GigaGAN, DMD2 and SwiftBrush v2, after arXiv 2104.08718
FIRST_SEED = 1_000_000  # as in the other reports: no training pair has such a noise
FEATURES = 2048  # of Inception's pooled layer
FULL_RANK = FEATURES + 1  # images below which their covariance is singular

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
# Of that file, as k-diffusion's evaluation pins it.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# The peers' code calls it ViT-G/14 and loads open_clip's ViT-g-14, laion2b_s12b_b42k.
CLIP_HUB_ID = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
CLIP_SIZE = (1408, 40, 1024)  # of ViT-g-14
FETCH_PEERS_CLIP = (
    f"Fetch the one that the peers use: hf download {CLIP_HUB_ID} --local-dir clip-vit-g-14"
)


@dataclass(frozen=True)
class CocoSet:
    """One of the two sets.

    Attributes:
        year: of the release.
        count: images that are generated.
        real: images of the validation set.
        figure: what the tables call the distance.

    """

    year: int
    count: int
    real: int
    figure: str

    @property
    def folder(self) -> str:
        """The folder of the real images."""
        return f"val{self.year}"

    @property
    def captions(self) -> str:
        """The file of captions, in ``annotations/``."""
        return f"captions_val{self.year}.json"

    @property
    def downloads(self) -> str:
        """The commands that fetch it."""
        host = "http://images.cocodataset.org"
        return (
            f"curl -O {host}/zips/val{self.year}.zip; "
            f"curl -O {host}/annotations/annotations_trainval{self.year}.zip"
        )


SETS = {
    2014: CocoSet(2014, 30_000, 40_504, "FID-30k"),
    2017: CocoSet(2017, 5_000, 5_000, "FID-5k"),
}


class Protocol(Record):
    """Everything that the numbers depend on but the models. Stored as coco.json.

    Attributes:
        year: of the set.
        images: that each row generates.
        captions: how they were chosen: of each drawn image a random one or its first; or a file's.
        captions_sha256: of the chosen captions, one a line.
        resolution: to which real and generated images are cropped and scaled, in pixels.
        reference: the real images: all of the validation set, or those whose captions were chosen.
        reference_sha256: of the real images' names, one a line.
        reference_images: how many there are.
        first_seed: of the noise of the first image; each further one has the next number.
        inception_sha256: of the file of Inception's weights.
        clip: name of the folder of CLIP; None where no CLIP score is measured.
        clip_sha256: of its weights.
        clip_size: width and layers of its vision part, and the width of its embeddings.
        clip_prefix: put before each caption for the CLIP score.

    """

    year: int
    images: int
    captions: Captions
    captions_sha256: str
    resolution: int
    reference: ReferenceSet
    reference_sha256: str
    reference_images: int
    first_seed: int = FIRST_SEED
    inception_sha256: str
    clip: str | None = None
    clip_sha256: str | None = None
    clip_size: tuple[int, int, int] | None = None
    clip_prefix: str = CLIP_PREFIX

    @property
    def figure(self) -> str:
        """What the distance may be called: 'FID-30k' where it is that of the peers' tables."""
        known = SETS[self.year]
        if not self.has_published_weights:
            return "Fréchet distance"
        return known.figure if self.images == known.count else f"FID-{self.images}"

    @property
    def has_published_weights(self) -> bool:
        """Whether Inception has the weights that FID is defined with."""
        return self.inception_sha256 == INCEPTION_SHA256

    @property
    def departures(self) -> list[str]:
        """In what the measurement is not the peers', a sentence each."""
        known = SETS[self.year]
        found = []
        if not self.has_published_weights:
            found.append(
                "Inception's weights are not those of inception-2015-12-05.pt: these distances are "
                "no FID, and compare with each other only."
            )
        if self.images != known.count:
            found.append(
                f"{self.images:,} images in place of {known.count:,}: FID depends on the number of "
                f"images, so this is no {known.figure}."
            )
        if self.images < FULL_RANK:
            found.append(
                f"{self.images:,} images are few: below {FULL_RANK:,} the covariance of 2,048 "
                "features is singular, and the distance is mostly bias."
            )
        if self.reference == "captioned":
            found.append("The reference is the captioned images alone; the peers take all.")
        elif self.reference_images != known.real:
            found.append(
                f"The reference has {self.reference_images:,} real images; {known.folder} has "
                f"{known.real:,}."
            )
        if self.resolution != RESOLUTION:
            found.append(f"Images are scaled to {self.resolution} pixels; the peers take 256.")
        if self.clip is not None and self.clip_size != CLIP_SIZE:
            found.append(
                f"The CLIP score is by {self.clip}, another model than the peers' ViT-g-14: "
                "compare it with scores of the same model only."
            )
        if self.clip is not None and self.clip_prefix != CLIP_PREFIX:
            found.append(
                f"The CLIP score's captions begin with {self.clip_prefix!r}; those of the peers "
                f"with {CLIP_PREFIX!r}."
            )
        return found

    @property
    def description(self) -> list[str]:
        """The whole protocol, a sentence for each choice, with its source."""
        return [
            self._captions_text(),
            f"Noise: seeds {self.first_seed:,} to {self.first_seed + self.images - 1:,}, in the "
            "captions' order, the same for every row whose images are made here.",
            f"Images: as the model makes them, cropped to a square about the centre, scaled to "
            f"{self.resolution}x{self.resolution} with Lanczos' filter; the real ones in the same "
            "way. GigaGAN (evaluation.py: compute_fid), DMD2 (coco_evaluator.py: compute_fid), "
            "SwiftBrush v2 (eval/fid.py).",
            "Features: clean-fid's mode 'clean' (arXiv 2104.11222): bicubic to 299x299 in float, "
            "channel by channel, without rounding to 8 bits; the 2,048 pooled features of "
            "Inception v3 of 2015-12-05.",
            f"Reference: {self._reference_text()} of val{self.year}, "
            f"{self.reference_images:,} images. The peers compute it of all images of val2014, and "
            "so it is here; no file of statistics is used.",
            self._clip_text(),
        ]

    def _captions_text(self) -> str:
        if self.captions == "file":
            return (
                f"Captions: the first {self.images:,} of a file, in its order. DMD2 and SwiftBrush "
                "v2 publish such lists."
            )
        one = "one at random" if self.captions == "random" else "the first one"
        return (
            f"Captions: of {self.images:,} images of val{self.year}, drawn with seed 0, "
            f"{one} of each. GigaGAN (data_util.py) takes one of five at random; DMD2 and "
            "SwiftBrush v2 take lists that they publish."
        )

    def _reference_text(self) -> str:
        return "all images" if self.reference == "all" else "the images whose captions were chosen"

    def _clip_text(self) -> str:
        if self.clip is None:
            return "CLIP score: not measured, as no model was given (--clip)."
        return (
            f"CLIP score: mean cosine of image and caption by {self.clip}, of the same crop; "
            f"captions begin with {self.clip_prefix!r}. GigaGAN, DMD2 and SwiftBrush v2 take "
            "open_clip's ViT-g-14, laion2b_s12b_b42k."
        )
