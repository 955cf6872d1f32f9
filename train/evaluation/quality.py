"""The quality of one-step images: images of teacher and student, and distances between sets.

Three numbers compare a set of images with the teacher's:

- KID-Lite0, the kernel inception distance (Binkowski et al. 2018, 'Demystifying MMD GANs', arXiv
  1801.01401) on EfficientNet-Lite0 features instead of Inception's. Compare its values with each
  other only, never with published KID.
- The paired distance, a DISTS-like distance (Ding et al. 2020, arXiv 2004.07728) on the same
  network's features, between images from the same prompt and noise.
- The high-frequency ratio, the energy beyond a Gaussian high-pass relative to the teacher's.

The training loss looks at other layers of the same network. A model trained with that loss has an
advantage in the first two numbers over a model that is not: report the paired numbers beside KID.

Shapes: N images of a set, B images of a batch, H, W image size in pixels, D features, C latent
channels, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.style import Style
from hipa_deploy.train.data.teacher_pairs import rows_at_once, teacher_latents
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.frequency import high_frequency_energy
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.unet_adaptor import one_step_model
from hipa_deploy.train.recipes.loss_settings import RADIUS
from hipa_deploy.train.recipes.recipe import TeacherSettings

CHUNK = 32  # images that go through a network at once
UNET_ROWS = 4  # images that a UNet takes, with guidance, in the memory of the decoder's one


@dataclass(frozen=True)
class Quality:
    """How a set of images compares with the teacher's for the same prompts.

    Attributes:
        kid_lite0: KID-Lite0 to the teacher's images from other noise, without pairs of one prompt.
            About 0 for the teacher's own images, larger for worse ones; may be a little negative.
        distance: Mean DISTS-like distance to the teacher's images from the same noise: 0 for equal
            images, about 1 where nothing agrees. None for images of other noise, or of noise that
            is not known: there is no pair to compare.
        high_frequency_ratio: High-frequency energy over that of the teacher's images from the same
            noise: 1 at best, below 1 for blurred images, above 1 for noisy ones.

    """

    kid_lite0: float
    distance: float | None
    high_frequency_ratio: float


def compare(
    images_NHWC: np.ndarray,
    teacher_NHWC: np.ndarray,
    others_NHWC: np.ndarray,
    prompts: Sequence[str],
) -> Quality:
    """Measure all three numbers of a set of images.

    Args:
        images_NHWC: The images to judge, uint8 [N, H, W, 3].
        teacher_NHWC: The teacher's images from the same noise, in the same order.
        others_NHWC: The teacher's images of the same prompts from other noise.
        prompts: The prompt of each row, which is the same in all three sets.

    Raises:
        HipaError: The sets differ in shape, or there are fewer than two different prompts.

    Example:
        >>> seeds, other_seeds = [0, 1, 2, 3], [4, 5, 6, 7]
        >>> teacher = teacher_images(folder, prompts, seeds, settings)
        >>> others = teacher_images(folder, prompts, other_seeds, settings)
        >>> one_step = one_step_images(folder, adaptor, prompts, seeds)
        >>> compare(one_step, teacher, others, prompts).distance
        0.13

    """
    return Quality(
        kid_lite0=kid_lite0(images_NHWC, others_NHWC, prompts),
        distance=paired_distance(images_NHWC, teacher_NHWC),
        high_frequency_ratio=high_frequency_ratio(images_NHWC, teacher_NHWC),
    )


def kid(
    features_a_ND: Tensor, features_b_ND: Tensor, prompts: Sequence[str] | None = None
) -> float:
    """Kernel inception distance: the unbiased squared MMD of two sets of features.

    With the polynomial kernel k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018, section 4)::

        KID = mean of k(a_i, a_j) over i != j  +  mean of k(b_i, b_j) over i != j
              - 2 * mean of k(a_i, b_j) over all i, j

    All pairs enter at once, rather than a mean over random subsets as in the paper: there is
    nothing to seed, and the variance is smaller.

    The formula takes the two sets to be independent. Rows that were made of the same prompt are
    not. ``prompts`` removes such pairs of rows from all three means, in the form of Gretton et al.
    2012, 'A Kernel Two-Sample Test', equation 4, which needs only that rows of different prompts
    are independent.

    Args:
        features_a_ND: Features of the first set, any float type; computed in float64.
        features_b_ND: Features of the second set. Without ``prompts`` it may have another N.
        prompts: The prompt of which the n-th row of both sets was made.

    Returns:
        0 on average where both sets come from one distribution, so that a single value may be
        negative; larger the more they differ, without an upper bound.

    Raises:
        HipaError: Fewer than two rows, fewer than two different prompts, or not one prompt for
            each row of both sets.

    Example:
        >>> a = torch.tensor([[1.0], [2.0]])
        >>> b = torch.tensor([[0.0], [3.0]])
        >>> kid(a, b)  # 27 + 1 - 2 * (1 + 64 + 1 + 343) / 4
        -176.5

    """
    if min(len(features_a_ND), len(features_b_ND)) < 2:
        raise HipaError(
            f"KID-Lite0 of {len(features_a_ND)} and {len(features_b_ND)} images. Expected at least "
            "two in each set."
        )

    # Which pairs of rows each mean is over, bool [N, N].
    if prompts is None:
        within_a = ~torch.eye(len(features_a_ND), dtype=torch.bool)
        within_b = ~torch.eye(len(features_b_ND), dtype=torch.bool)
        across = torch.ones(len(features_a_ND), len(features_b_ND), dtype=torch.bool)
    else:
        within_a = within_b = across = other_prompts(prompts, features_a_ND, features_b_ND)

    kernel_a, kernel_b, kernel_across = kernels(features_a_ND, features_b_ND)
    within = kernel_a[within_a].mean() + kernel_b[within_b].mean()
    return float(within - 2 * kernel_across[across].mean())


def kernels(features_a_ND: Tensor, features_b_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KID's kernel within the first set, within the second, and across them, float64 [N, N]."""
    # Cubes of sums over a thousand features lose their differences in float32.
    a_ND = features_a_ND.double()
    b_ND = features_b_ND.double()
    return _kernel(a_ND, a_ND), _kernel(b_ND, b_ND), _kernel(a_ND, b_ND)


def kid_lite0(
    images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray, prompts: Sequence[str] | None = None
) -> float:
    """KID-Lite0: ``kid`` of the pooled EfficientNet-Lite0 features of two image sets.

    Args:
        images_a_NHWC: uint8 [N, H, W, 3].
        images_b_NHWC: uint8 [N, H, W, 3].
        prompts: As for ``kid``.

    Returns:
        0 on average where both sets come from one distribution; see ``kid``.

    Raises:
        HipaError: As ``kid``.

    """
    return kid(lite0_features(images_a_NHWC), lite0_features(images_b_NHWC), prompts)


def lite0_features(images_NHWC: np.ndarray) -> Tensor:
    """Pooled EfficientNet-Lite0 features float32 [N, 1280] of uint8 images [N, H, W, 3]."""
    return pooled_features(_lite0(), images_NHWC)


def pooled_features(network: Lite0, images_NHWC: np.ndarray) -> Tensor:
    """Pooled features float32 [N, 1280] of uint8 images [N, H, W, 3], by any such network."""
    return _by_chunks(network.pooled, images_NHWC)


def paired_distance(images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray) -> float:
    """Mean of ``paired_distances`` over two uint8 image sets [N, H, W, 3]."""
    return float(paired_distances(images_a_NHWC, images_b_NHWC).mean())


def paired_distances(images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray) -> Tensor:
    """DISTS-like distance between the n-th images of two sets.

    Over all channels c of the image itself and of EfficientNet-Lite0's feature maps x and y of the
    two images (Ding et al. 2020, equations 4 to 8)::

        D  = 1 - mean over c of (S1 + S2) / 2
        S1 = (2 mean(x) mean(y) + c1) / (mean(x)^2 + mean(y)^2 + c1)    texture
        S2 = (2 cov(x, y) + c2) / (var(x) + var(y) + c2)                structure

    DISTS weighs the channels of VGG16 with published weights; here all channels weigh the same, so
    the distance is DISTS-like and not DISTS (``hipa_deploy.train.losses.dists``).

    Args:
        images_a_NHWC: uint8 [N, H, W, 3].
        images_b_NHWC: uint8, of the same shape.

    Returns:
        float32 [N]: 0 for equal images, about 1 where nothing agrees.

    Raises:
        HipaError: The sets differ in shape.

    """
    return _by_chunks(_dists_like(), images_a_NHWC, images_b_NHWC)


def high_frequency_ratio(
    images_a_NHWC: np.ndarray, images_b_NHWC: np.ndarray, radius: float = RADIUS
) -> float:
    """Mean high-frequency energy of one image set over that of another.

    The ratio is mean_n E(a_n) / mean_n E(b_n), with the energies E of ``high_frequency_energies``.
    It is a ratio of means, because a single flat image has hardly any energy to divide by.

    Args:
        images_a_NHWC: uint8 [N, H, W, 3].
        images_b_NHWC: uint8 [N, H, W, 3]: the reference.
        radius: Radius of the high-pass, in units of the Nyquist frequency.

    Returns:
        1 where both sets are equally sharp, below 1 where the first is blurred, above 1 where it is
        noisy; never negative.

    """
    energy_a = high_frequency_energies(images_a_NHWC, radius).mean()
    energy_b = high_frequency_energies(images_b_NHWC, radius).mean()
    return float(energy_a / energy_b)


def high_frequency_energies(images_NHWC: np.ndarray, radius: float = RADIUS) -> Tensor:
    """High-frequency energy of each image: the power that passes the training loss's high-pass.

    E = mean over channels and frequencies of |H FFT(image)|^2, with the orthonormal transform and
    the Gaussian high-pass H = 1 - exp(-r^2 / (2 radius^2)). With H = 1 it would be the mean square
    of the pixels (Parseval).

    Args:
        images_NHWC: uint8 [N, H, W, 3]; measured with pixels in [0, 1].
        radius: Radius of the high-pass, in units of the Nyquist frequency.

    Returns:
        float32 [N], each in [0, 1].

    """
    return _by_chunks(lambda image: high_frequency_energy(image, radius), images_NHWC)


def teacher_images(
    model_dir: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    teacher: TeacherSettings,
    *,
    device: str | None = None,
    style: Style | None = None,
    text: TextSettings | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Images of the multi-step sampler with guidance.

    Args:
        model_dir: Diffusers folder of the base model.
        prompts: N prompts.
        seeds: The noise seed of each prompt.
        teacher: Sampler, steps and guidance.
        device: 'cpu', 'cuda', ...; None is the GPU if there is one.
        style: LoRAs and embeddings that are added to the model.
        text: How prompts are encoded; None is one chunk, all layers.
        size: Height and width in pixels; None is what the model was made for.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        HipaError: Not one seed for each prompt, or a model that cannot be loaded.

    """
    model = DiffusionModel.load(model_dir, device, style=style, text=text, size=size)
    unguided = model.unguided()

    def latents(noise_BCHW: Tensor, conditions: Conditions) -> Tensor:
        return teacher_latents(model, noise_BCHW, conditions, unguided, teacher)

    return decoded_images(model, latents, prompts, seeds)


def one_step_images(
    model_dir: Path,
    adaptor_dir: Path | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    timestep: int = 999,
    device: str | None = None,
    style: Style | None = None,
    text: TextSettings | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """One-step images of the base model, or of the base model with an adaptor.

    Args:
        model_dir: Diffusers folder of the base model.
        adaptor_dir: Folder of an adaptor, whose own timestep is used; None is the base model.
        prompts: N prompts.
        seeds: The noise seed of each prompt.
        timestep: Timestep of the step without an adaptor.
        device: 'cpu', 'cuda', ...; None is the GPU if there is one.
        style: LoRAs and embeddings that are added to the model before the adaptor.
        text: How prompts are encoded; None is as the adaptor was trained.
        size: Height and width in pixels; None is what the adaptor was trained at, or without one
            what the model was made for.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        HipaError: Not one seed for each prompt, a model or adaptor that cannot be loaded, or an
            adaptor of another task or model.

    """
    if adaptor_dir is not None:
        trained = read_metadata(adaptor_dir)
        text = text or trained.text
        size = size or trained.resolution
    model = DiffusionModel.load(model_dir, device, style=style, text=text, size=size)
    return decoded_images(model, one_step_model(model, timestep, adaptor_dir), prompts, seeds)


@torch.no_grad()
def decoded_images(
    model: DiffusionModel,
    latents: Callable[[Tensor, Conditions], Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> np.ndarray:
    """Decoded images of ``latents(noise, conditions)``, in chunks that fit in memory.

    Args:
        model: Makes noise and conditions, and decodes.
        latents: Noise [B, C, h, w] and conditions -> scaled latents [B, C, h, w].
        prompts: N prompts.
        seeds: The noise seed of each prompt.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        HipaError: Not one seed for each prompt.

    """
    if len(prompts) != len(seeds) or not seeds:
        raise HipaError(
            f"{len(prompts)} prompts and {len(seeds)} seeds. Expected one seed for each prompt."
        )

    # Noise and conditions are made for each chunk, so that memory does not grow with the set.
    images = []
    decoded_at_once = rows_at_once(model.resolution, CHUNK)
    at_once = min(CHUNK, UNET_ROWS * decoded_at_once)
    for start in range(0, len(seeds), at_once):
        chunk = slice(start, start + at_once)
        noise_BCHW = model.noise(seeds[chunk])
        made = latents(noise_BCHW, model.conditions(prompts[chunk]))
        for piece in made.split(decoded_at_once):
            images.append(to_uint8(model.decode(piece)))
    return torch.cat(images).numpy()


# Loaded once for a process: reports call the measures many times.
@cache
def _lite0() -> Lite0:
    return Lite0.pretrained()


@cache
def _dists_like() -> DistsLike:
    return DistsLike()


@torch.no_grad()
def _by_chunks(function: Callable[..., Tensor], *sets_NHWC: np.ndarray) -> Tensor:
    """``function`` of float images [B, 3, H, W], one argument for each set, in chunks of the sets.

    Raises:
        HipaError: The sets differ in shape.

    """
    shapes = [images.shape for images in sets_NHWC]
    if len(set(shapes)) != 1:
        raise HipaError(f"image sets of shapes {shapes}. Expected equal ones, [N, H, W, 3].")

    # The copy makes arrays writable that come from a file or a broadcast: torch warns otherwise.
    chunks = [torch.from_numpy(np.array(images)).split(CHUNK) for images in sets_NHWC]
    results = []
    for group in zip(*chunks, strict=True):
        results.append(function(*map(to_float, group)))
    return torch.cat(results)


def _kernel(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The polynomial kernel of every pair of rows, [N, N]."""
    return (a_ND @ b_ND.T / a_ND.shape[1] + 1) ** 3


def other_prompts(prompts: Sequence[str], a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Which pairs of rows have different prompts, bool [N, N]."""
    # Equal prompts get one number, that of their last row; only whether numbers differ matters.
    number_of = {prompt: number for number, prompt in enumerate(prompts)}
    number_N = torch.tensor([number_of[prompt] for prompt in prompts])
    if not len(a_ND) == len(b_ND) == len(number_N) or len(number_of) < 2:
        raise HipaError(
            f"KID-Lite0 of {len(a_ND)} and {len(b_ND)} images of {len(number_N)} prompts, "
            f"{len(number_of)} of them different. Expected a prompt for each row, and at least two."
        )
    return number_N[:, None] != number_N
