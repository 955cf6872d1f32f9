"""How good a one-step model is: images of teacher and student, and distances between the two sets.

KID-Lite0 is the kernel inception distance (Binkowski et al. 2018) on EfficientNet-Lite0 features instead of
Inception's: its values compare with each other only. The training loss looks at other layers of the same network,
so a model trained with it has an advantage over one that is not: give the paired numbers beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data.teacher_pairs import teacher_latents
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.frequency import high_frequency_energy
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.unet_adaptor import one_step_model
from hipa_deploy.train.recipes.recipe import RADIUS, TeacherSettings

CHUNK = 32


@dataclass(frozen=True)
class Quality:
    """A set of images against the teacher's for the same prompts.

    kid_lite0: KID-Lite0 to the teacher's images from other noise, without pairs of one prompt: its own are at 0;
    distance: mean DISTS-like distance to its images from the same noise; high_frequency_ratio: high frequency energy
    over those images', 1 at best.
    """

    kid_lite0: float
    distance: float
    high_frequency_ratio: float


def compare(
    images_NHWC: np.ndarray,
    teacher_NHWC: np.ndarray,
    others_NHWC: np.ndarray,
    prompts: Sequence[str],
) -> Quality:
    """All three numbers of a uint8 set [N, H, W, 3]: the teacher's from the same noise, image by image, and from other.

    ``prompts`` are those of each row, of all three sets.
    """
    return Quality(
        kid_lite0=kid_lite0(images_NHWC, others_NHWC, prompts),
        distance=paired_distance(images_NHWC, teacher_NHWC),
        high_frequency_ratio=high_frequency_ratio(images_NHWC, teacher_NHWC),
    )


def kid(
    features_a_ND: Tensor, features_b_ND: Tensor, prompts: Sequence[str] | None = None
) -> float:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018, section 4): may be negative.

    All pairs at once rather than a mean over random subsets: nothing to seed, less variance. The sets are taken to be
    independent, unless ``prompts`` says what the n-th rows of both were made of: rows of the same prompt are not, and
    the kernel of two such rows counts nowhere, in the form of Gretton et al. 2012, 'A Kernel Two-Sample Test', equation
    4, which needs only that rows of different prompts are independent.

    Raises:
        HipaError: fewer than two images, or prompts, to compare.

    """
    a_ND, b_ND = features_a_ND.double(), features_b_ND.double()
    if min(len(a_ND), len(b_ND)) < 2:
        raise HipaError(
            f"KID-Lite0 of {len(a_ND)} and {len(b_ND)} images. Expected at least two in each set."
        )
    if prompts is None:
        within_a, within_b = (~torch.eye(len(rows), dtype=torch.bool) for rows in (a_ND, b_ND))
        across = torch.ones(len(a_ND), len(b_ND), dtype=torch.bool)
    else:
        within_a = within_b = across = _other_prompts(prompts, a_ND, b_ND)
    within = _kernel(a_ND, a_ND)[within_a].mean() + _kernel(b_ND, b_ND)[within_b].mean()
    return float(within - 2 * _kernel(a_ND, b_ND)[across].mean())


def kid_lite0(
    images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray, prompts: Sequence[str] | None = None
) -> float:
    """``kid`` of two uint8 image sets [N, H, W, 3]: 0 on average where they come from one distribution."""
    return kid(lite0_features(images_a_NHWC), lite0_features(images_b_NHWC), prompts)


def lite0_features(images_NHWC: np.ndarray) -> Tensor:
    """Pooled EfficientNet-Lite0 features float32 [N, 1280] of uint8 images [N, H, W, 3]."""
    return _by_chunks(_lite0().pooled, images_NHWC)


def paired_distance(images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray) -> float:
    """Mean DISTS-like distance between the n-th images of two uint8 sets [N, H, W, 3]."""
    return float(paired_distances(images_a_NHWC, images_b_NHWC).mean())


def paired_distances(images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray) -> Tensor:
    """DISTS-like distance between the n-th images of two uint8 sets [N, H, W, 3]: float32 [N]."""
    return _by_chunks(_dists_like(), images_a_NHWC, images_b_NHWC)


def high_frequency_ratio(
    images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray, radius: float = RADIUS
) -> float:
    """High-frequency energy of set a over that of set b, uint8 [N, H, W, 3]."""
    energies = [
        high_frequency_energies(images, radius).mean() for images in (images_a_NHWC, images_b_NHWC)
    ]
    return float(energies[0] / energies[1])


def high_frequency_energies(images_NHWC: np.ndarray, radius: float = RADIUS) -> Tensor:
    """High-frequency energy of each uint8 image [N, H, W, 3], pixels in [0, 1]: float32 [N]."""
    return _by_chunks(lambda image: high_frequency_energy(image, radius), images_NHWC)


def teacher_images(
    model_dir: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    teacher: TeacherSettings,
    *,
    device: str | None = None,
) -> np.ndarray:
    """Images of the multi-step guided sampler, uint8 [N, H, W, 3], one for each (prompt, noise seed)."""
    model = DiffusionModel.load(model_dir, device)
    empty_1LD = model.context([""])

    def latents(noise_BCHW: Tensor, context_BLD: Tensor) -> Tensor:
        return teacher_latents(model, noise_BCHW, context_BLD, empty_1LD, teacher)

    return _images(model, latents, prompts, seeds)


def one_step_images(
    model_dir: Path,
    adaptor_dir: Path | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    timestep: int = 999,
    device: str | None = None,
) -> np.ndarray:
    """One-step images, uint8 [N, H, W, 3]: of the base model, or with an adaptor at the timestep it was trained for."""
    model = DiffusionModel.load(model_dir, device)
    return _images(model, one_step_model(model, timestep, adaptor_dir), prompts, seeds)


@torch.no_grad()
def _images(
    model: DiffusionModel,
    latents: Callable[[Tensor, Tensor], Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> np.ndarray:
    if len(prompts) != len(seeds) or not seeds:
        raise HipaError(
            f"{len(prompts)} prompts and {len(seeds)} seeds. Expected one seed for each prompt."
        )
    images = []
    for start in range(0, len(seeds), CHUNK):
        chunk = slice(start, start + CHUNK)
        images.append(
            to_uint8(
                model.decode(latents(model.noise(seeds[chunk]), model.context(prompts[chunk])))
            )
        )
    return torch.cat(images).numpy()


@cache
def _lite0() -> Lite0:
    return Lite0.pretrained()


@cache
def _dists_like() -> DistsLike:
    return DistsLike()


@torch.no_grad()
def _by_chunks(function: Callable[..., Tensor], *sets_NHWC: np.ndarray) -> Tensor:
    if (
        len({images.shape[1:] for images in sets_NHWC}) != 1
        or len({len(images) for images in sets_NHWC}) != 1
    ):
        raise HipaError(
            f"image sets of shapes {[i.shape for i in sets_NHWC]}. Expected equal ones, [N, H, W, 3]."
        )
    chunks = [torch.from_numpy(np.array(images)).split(CHUNK) for images in sets_NHWC]
    return torch.cat(
        [function(*(to_float(chunk) for chunk in group)) for group in zip(*chunks, strict=True)]
    )


def _kernel(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    return (a_ND @ b_ND.T / a_ND.shape[1] + 1) ** 3


def _other_prompts(prompts: Sequence[str], a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Which two rows have different prompts, bool [N, N]."""
    index = {prompt: i for i, prompt in enumerate(prompts)}
    number_N = torch.tensor([index[prompt] for prompt in prompts])
    if not len(a_ND) == len(b_ND) == len(number_N) or len(index) < 2:
        got = f"{len(a_ND)} and {len(b_ND)} images of {len(number_N)} prompts, {len(index)} of them different"
        raise HipaError(f"KID-Lite0 of {got}. Expected a prompt for each row, and at least two.")
    return number_N[:, None] != number_N
