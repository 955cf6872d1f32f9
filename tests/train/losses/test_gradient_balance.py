from __future__ import annotations

import pytest
import torch

from hipa_deploy.train.losses.gradient_balance import MAX_SCALE, GradientBalance, gradient_scales


def test_scales_make_the_gradients_as_long_as_the_first() -> None:
    image = torch.rand(1, 3, 4, 4, requires_grad=True)
    target = torch.rand(1, 3, 4, 4)
    terms = [
        (image * target).sum(),
        7 * (image - target).square().sum(),
        (image - target).square().sum(),
    ]
    scales = gradient_scales(terms, image)
    assert scales[0] == 1
    for scale, term in zip(scales, terms, strict=True):
        (gradient,) = torch.autograd.grad(scale * term, image, retain_graph=True)
        assert gradient.norm() == pytest.approx(float(target.norm()), rel=1e-5)
    assert scales[2] == pytest.approx(7 * float(scales[1]), rel=1e-5)


def test_a_term_without_gradient_gets_the_largest_scale() -> None:
    image = torch.rand(1, 1, 2, 2, requires_grad=True)
    assert gradient_scales([image.sum(), 0 * image.sum()], image).tolist() == [1, MAX_SCALE]


def test_measures_at_every_nth_evaluation_and_never_without_gradient() -> None:
    balance = GradientBalance(2, every=2)

    def scale(strength: float, grad: bool = True) -> float:
        image = torch.ones(1, 1, 2, 2, requires_grad=grad)
        return float(balance([image.sum(), strength * image.sum()], image)[1])

    assert scale(9.0, grad=False) == 1
    assert [scale(2.0), scale(5.0), scale(4.0)] == pytest.approx([0.5, 0.5, 0.25])
    with torch.no_grad():
        assert scale(9.0) == pytest.approx(0.25)
    assert int(balance.state[0]) == 3
    assert not balance.state.requires_grad
