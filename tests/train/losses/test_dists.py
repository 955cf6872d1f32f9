from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses import backbones
from hipa_deploy.train.losses.dists import C1, C2, DistsLike, dists_distance, perceptual_distance


def no_features(image: torch.Tensor) -> list[torch.Tensor]:
    return []


def test_equal_images_are_at_distance_zero() -> None:
    image = torch.rand(2, 3, 64, 64)
    assert torch.allclose(DistsLike()(image, image), torch.zeros(2), atol=1e-5)


def test_constant_images_have_the_closed_form() -> None:
    # Without variance structure is c2 / c2 = 1; texture compares the means.
    x = torch.full((1, 3, 8, 8), 0.2).double()
    y = torch.full((1, 3, 8, 8), 0.8).double()
    texture = (2 * 0.2 * 0.8 + C1) / (0.2**2 + 0.8**2 + C1)
    assert DistsLike(no_features)(x, y).item() == pytest.approx(1 - (texture + 1) / 2)


def test_negated_structure_is_the_worst() -> None:
    detail = torch.randn(1, 1, 16, 16).double()
    detail -= detail.mean()
    variance = detail.square().mean()
    structure = (-2 * variance + C2) / (2 * variance + C2)
    got = dists_distance([detail + 0.5], [0.5 - detail]).item()
    assert got == pytest.approx(float(1 - (1 + structure) / 2))


def test_grows_with_blur() -> None:
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 16, 16), size=64, mode="bicubic").clamp(0, 1)
    distance = DistsLike()
    blurred = [distance(F.avg_pool2d(image, k, 1, k // 2), image).item() for k in (1, 3, 7)]
    assert blurred == sorted(blurred)
    assert blurred[0] < 1e-5 < blurred[1]


def test_gradients() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3).double()

    def backbone(image: torch.Tensor) -> list[torch.Tensor]:
        return [F.softplus(F.conv2d(image, kernel))]

    image, target = torch.rand(2, 1, 3, 6, 6).double()
    distance = DistsLike(backbone)
    assert torch.autograd.gradcheck(lambda x: distance(x, target), image.requires_grad_())


def test_resizes_before_the_backbone() -> None:
    seen = []

    def backbone(image: torch.Tensor) -> list[torch.Tensor]:
        seen.append(tuple(image.shape[2:]))
        return []

    image = torch.rand(1, 3, 16, 24)
    DistsLike(backbone, size=32)(image, image)
    assert seen == [(32, 48), (32, 48)]


@pytest.mark.filterwarnings("ignore")
def test_vgg16_with_the_published_weights_is_dists(
    monkeypatch: pytest.MonkeyPatch, random_vgg16
) -> None:
    """Beside the port of the authors' code in torchmetrics, both on the same random VGG16."""
    from torchmetrics.functional.image import dists

    monkeypatch.setattr(dists, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(dists, "VGG16_Weights", SimpleNamespace(DEFAULT=None), raising=False)
    monkeypatch.setattr(
        dists, "vgg16", lambda weights: SimpleNamespace(features=random_vgg16()), raising=False
    )
    monkeypatch.setattr(backbones, "torchvision_vgg16", random_vgg16)
    image, target = torch.rand(2, 2, 3, 48, 64)
    expected = dists.DISTSNetwork()(image, target, require_grad=True)
    assert torch.allclose(perceptual_distance("dists", "vgg16")(image, target), expected, atol=1e-5)
    # The published weights make a difference.
    equal_weights = DistsLike(backbones.load_backbone("vgg16", "l2"))(image, target)
    assert not torch.allclose(equal_weights, expected, atol=1e-3)


def test_unknown_distance_is_refused() -> None:
    with pytest.raises(HipaError, match=r"'ssim' is unknown. Expected dists or lpips"):
        perceptual_distance("ssim")
