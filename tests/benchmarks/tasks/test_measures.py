from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality.retrieval import train_heads
from benchmarks.tasks import measures
from benchmarks.tasks.measures import (
    choice_recall,
    masked_distance,
    masked_psnr,
    psnr,
    seam_energies,
    seam_ratio,
    structure_distance,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.quality import lite0_features
from hipa_deploy.train.losses.lpips import LpipsLike

SHAPE = (3, 64, 64, 3)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8)


@pytest.fixture
def masks() -> np.ndarray:
    masks = np.zeros(SHAPE[:3], np.float32)
    masks[0, 10:30, 20:50] = 1
    masks[1, :, :32] = 1
    masks[2, 40:44, 40:44] = 1
    return masks


def test_psnr_by_hand() -> None:
    truth = np.full((3, 4, 4, 3), 100, np.uint8)
    images = truth.copy()
    images[1] += 5
    images[2, 0] += 10  # a quarter of the pixels
    assert np.isinf(psnr(images, truth)[0])
    assert psnr(images, truth)[1:] == pytest.approx([20 * np.log10(255 / 5)] * 2)


def test_psnr_inside_the_mask_sees_nothing_else(masks: np.ndarray) -> None:
    truth = np.full(SHAPE, 100, np.uint8)
    images = np.where(masks[..., None] > 0, 110, noise(0)).astype(np.uint8)
    assert masked_psnr(images, truth, masks) == pytest.approx([20 * np.log10(25.5)] * 3)


def test_the_distance_inside_a_full_mask_is_lpips_like() -> None:
    a = noise(0)
    b = noise(1)
    ours = masked_distance(a, b, np.ones(SHAPE[:3]))
    tensors = (torch.from_numpy(i).permute(0, 3, 1, 2).float() / 255 for i in (a, b))
    with torch.no_grad():
        assert ours == pytest.approx(LpipsLike()(*tensors).numpy(), rel=1e-5)


def test_the_distance_by_hand(masks: np.ndarray) -> None:
    """With raw pixels as the only map, black and white differ by 1.

    White is a unit vector, each of its three channels 1 / sqrt(3): the squares sum to 1.
    """
    black = np.zeros(SHAPE, np.uint8)
    white = np.full(SHAPE, 255, np.uint8)
    assert masked_distance(white, black, masks, lambda image: [image]) == pytest.approx([1, 1, 1])
    half = white.copy()
    half[1, :, :16] = 0
    assert masked_distance(half, black, masks, lambda image: [image]) == pytest.approx([1, 0.5, 1])


def test_the_distance_depends_on_nothing_outside_the_mask(
    masks: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = noise(0)
    images = noise(1)
    outside = np.where(masks[..., None] > 0, images, noise(2))
    distance = masked_distance(images, truth, masks)
    np.testing.assert_array_equal(masked_distance(outside, truth, masks), distance)
    assert masked_distance(truth, truth, masks).tolist() == [0, 0, 0]
    assert (distance > 0.1).all()
    monkeypatch.setattr(measures, "CHUNK", 2)
    assert masked_distance(images, truth, masks) == pytest.approx(distance, rel=1e-5)


def test_seam_energy_by_hand() -> None:
    masks = np.zeros((1, 4, 4), np.float32)
    masks[0, 1:3, 1:3] = 1  # eight pairs of neighbours
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[0, 1, 1] = [255, 0, 0]  # two of them differ, in one of three colours
    assert seam_energies(images, masks) == pytest.approx([2 / 8 / 3])
    images[0, 0, 0] = 255  # no pair of the border
    assert seam_energies(images, masks) == pytest.approx([2 / 8 / 3])


def test_a_seam_that_shows_and_one_that_is_smeared(masks: np.ndarray) -> None:
    ramp = np.broadcast_to((np.arange(64) * 3)[None, None, :, None], SHAPE).astype(np.uint8)
    assert seam_ratio(ramp, ramp, masks) == 1
    brighter = np.where(masks[..., None] > 0, ramp + 40, ramp).astype(np.uint8)
    assert seam_ratio(brighter, ramp, masks) > 5
    assert seam_ratio(np.full(SHAPE, 9, np.uint8), ramp, masks) == 0


def squares(left: int, level: int = 200, ground: int = 50) -> np.ndarray:
    images = np.full((1, 64, 64, 3), ground, np.uint8)
    images[:, 20:40, left : left + 20] = level
    return images


def test_structure_ignores_colour_and_contrast_but_not_place() -> None:
    source = squares(20)
    for same in (source, 255 - source, squares(20, 90, 60), squares(20, 0, 255)):
        assert structure_distance(same, source) == pytest.approx([0], abs=1e-3)
    near = structure_distance(squares(21), source)[0]
    far = structure_distance(squares(34), source)[0]
    assert 0.01 < near < 0.5 < far
    unrelated = structure_distance(noise(0), noise(1))
    assert unrelated == pytest.approx([1, 1, 1], abs=0.1)


def test_structure_of_images_without_edges() -> None:
    flat = np.full((1, 64, 64, 3), 90, np.uint8)
    assert structure_distance(flat, flat + 9).tolist() == [0]
    assert structure_distance(flat, squares(20)).tolist() == [1]


def test_choice_recall_finds_the_caption_that_was_asked_for() -> None:
    images = (
        np.repeat(np.arange(0, 256, 17, dtype=np.uint8), 64 * 64 * 3).reshape(16, 64, 64, 3).copy()
    )
    images[:, ::2, :, 0] = 255 - images[:, ::2, :, 0]
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(16, 12), dim=-1)
    heads = train_heads(lite0_features(images), texts, epochs=200)
    choices = torch.stack([texts, texts.roll(8, dims=0)], dim=1)
    assert choice_recall(heads, images, choices) > 0.8
    assert choice_recall(heads, images, choices.flip(1)) < 0.2


def test_sets_that_do_not_belong_together(masks: np.ndarray) -> None:
    images = noise(0)
    for call, words in [
        (lambda: psnr(images, images[:2]), "Expected equal ones"),
        (lambda: structure_distance(images, images[:, :32]), "Expected equal ones"),
        (lambda: masked_psnr(images, images, masks[:, :32]), "masks of shape"),
        (lambda: masked_distance(images, images, masks * 0), "a mask is empty"),
        (lambda: seam_energies(images, masks * 0 + 1), "mask 0 is full"),
        (lambda: seam_ratio(images, images * 0, masks), "truth is flat"),
    ]:
        with pytest.raises(HipaError, match=words):
            call()
