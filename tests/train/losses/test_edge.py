from __future__ import annotations

import pytest
import torch

from hipa_deploy.train.losses.edge import (
    OPERATORS,
    edge_loss,
    edge_similarity_loss,
    laplacian,
    sobel,
)


def test_sobel_of_a_ramp_is_its_slope() -> None:
    ramp = (0.1 * torch.arange(8.0)).expand(1, 2, 6, 8)
    responses = sobel(ramp)
    assert responses.shape == (1, 4, 4, 6)
    assert torch.allclose(responses[:, 0::2], torch.tensor(0.1))
    assert torch.allclose(responses[:, 1::2], torch.tensor(0.0), atol=1e-6)
    assert edge_loss(ramp, torch.zeros_like(ramp)) == pytest.approx(0.05)


def test_laplacian_of_a_parabola_is_its_curvature() -> None:
    x = torch.arange(8.0)
    y = torch.arange(6.0)[:, None]
    bowl = (0.1 * x**2 + 0.2 * y**2).expand(1, 2, 6, 8)
    assert laplacian(bowl).shape == (1, 2, 4, 6)
    assert torch.allclose(laplacian(bowl), torch.tensor(0.6), atol=1e-5)
    assert torch.allclose(laplacian(x.expand(1, 2, 6, 8)), torch.tensor(0.0), atol=1e-5)
    assert edge_loss(bowl, torch.zeros_like(bowl), "laplacian") == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_brightness_does_not_matter(operator: str) -> None:
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert edge_loss(image, image + 0.3, operator) == pytest.approx(0, abs=1e-12)
    assert edge_loss(image, image.roll(1, dims=3), operator) > 0.01


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients(operator: str) -> None:
    torch.manual_seed(0)
    image, target = torch.rand(2, 1, 2, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: edge_loss(x, target, operator), image.requires_grad_()
    )
    edge_loss(image, image.detach(), operator).backward()
    assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_similarity_of_a_scaled_image_has_the_closed_form(operator: str, scale: float) -> None:
    image = 100 * torch.randn(1, 2, 32, 32, dtype=torch.float64)  # far above the floor
    expected = 1 - 2 * scale / (scale**2 + 1)
    got = edge_similarity_loss(scale * image, image, operator).item()
    assert got == pytest.approx(expected, abs=1e-5)


def test_missing_edges_count_alike_faint_or_strong() -> None:
    torch.manual_seed(0)
    edges = torch.rand(1, 3, 18, 18)
    flat = torch.full((1, 3, 18, 18), 0.5)
    strong = edge_similarity_loss(flat, 0.5 + edges)
    faint = edge_similarity_loss(flat, 0.5 + 0.3 * edges)
    assert 0.8 * strong < faint < strong < 1
    assert edge_similarity_loss(flat, flat + 0.1) == 0
