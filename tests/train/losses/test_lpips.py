from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hipa_deploy.train.losses import backbones
from hipa_deploy.train.losses.dists import perceptual_distance
from hipa_deploy.train.losses.lpips import LpipsLike, lpips_distance


def test_orthogonal_features_have_the_closed_form() -> None:
    # Unit vectors at a right angle differ by sqrt(2), whatever the lengths before normalisation:
    # D = w1 + w2 at every place.
    x, y = torch.zeros(2, 1, 2, 3, 3).double()
    x[:, 0] = 5
    y[:, 1] = 0.1
    assert lpips_distance([x], [y]).item() == pytest.approx(2, rel=1e-5)
    heads = [torch.tensor([0.25, 0.5])] * 2
    assert lpips_distance([x, x], [y, x], heads).item() == pytest.approx(0.75, rel=1e-5)


def test_equal_images_are_at_distance_zero_and_blur_adds_distance() -> None:
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(2, 3, 16, 16), size=64, mode="bicubic").clamp(0, 1)
    distance = LpipsLike()
    blurred = [distance(F.avg_pool2d(image, k, 1, k // 2), image).mean().item() for k in (1, 3, 7)]
    assert blurred == sorted(blurred)
    assert blurred[0] < 1e-6 < blurred[1]


def test_gradients() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3).double()
    distance = LpipsLike(lambda image: [F.softplus(F.conv2d(image, kernel))])
    image, target = torch.rand(2, 1, 3, 6, 6).double()
    assert torch.autograd.gradcheck(lambda x: distance(x, target), image.requires_grad_())


def test_gradient_is_finite_where_features_vanish() -> None:
    image = torch.zeros(1, 3, 4, 4, requires_grad=True)
    LpipsLike(lambda image: [image])(image, torch.rand(1, 3, 4, 4)).sum().backward()
    assert torch.isfinite(image.grad).all()


@pytest.mark.filterwarnings("ignore")
def test_vgg16_with_the_published_heads_is_lpips(
    monkeypatch: pytest.MonkeyPatch, random_vgg16
) -> None:
    """Beside the port of the authors' code in torchmetrics, both on the same random VGG16."""
    from torchmetrics.functional.image import lpips

    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: random_vgg16())
    monkeypatch.setattr(backbones, "torchvision_vgg16", random_vgg16)
    image, target = torch.rand(2, 2, 3, 32, 48)
    expected = lpips._LPIPS(net="vgg")(image, target, normalize=True).flatten()
    assert torch.allclose(perceptual_distance("lpips", "vgg16")(image, target), expected, rtol=1e-4)
