"""The gradient of score distillation, against a divergence that is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.train.distribution.score_distillation import (
    Predict,
    ScoreDistillation,
    noised,
    prediction_target,
)
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.recipes.distribution_settings import ScoreSettings

ALPHA_BAR = torch.tensor([0.9, 0.5, 0.1])
EMPTY = Conditions(torch.zeros(1, 1, 1))


def gaussian_model(mean: float, deviation: float, calls: list[Conditions] | None = None) -> Predict:
    """The exact noise prediction of a Gaussian: from the mean of x0 given z (Bayes' rule)."""

    def predict(z: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if calls is not None:
            calls.append(conditions)
        alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        a = alpha_bar.sqrt()
        variance = deviation**2
        gain = a * variance / (alpha_bar * variance + 1 - alpha_bar)
        x0 = mean + gain * (z - a * mean)
        return (z - a * x0) / (1 - alpha_bar).sqrt()

    return predict


def distillation(
    teacher: Predict, fake: Predict, guidance: float = 1.0, **settings: object
) -> ScoreDistillation:
    return ScoreDistillation(
        ScoreSettings.model_validate({"weight": 1.0, **settings}),
        teacher,
        fake,
        guidance=guidance,
        alpha_bar_T=ALPHA_BAR,
        prediction_type="epsilon",
        unguided=EMPTY,
    )


def conditions_of(rows: int) -> Conditions:
    return Conditions(torch.ones(rows, 1, 1))


@pytest.mark.parametrize("timestep", [0, 1, 2])
def test_the_gradient_is_that_of_the_divergence_of_two_gaussians(timestep: int) -> None:
    # The student makes N(0.7, 0.3), by mean + deviation * u; the teacher is N(-0.2, 0.8).
    mean = torch.tensor(0.7, requires_grad=True)
    deviation = torch.tensor(0.3, requires_grad=True)
    alpha_bar = ALPHA_BAR[timestep]
    a = alpha_bar.sqrt()
    spread = (alpha_bar * deviation**2 + 1 - alpha_bar).sqrt()
    teacher_spread = (alpha_bar * 0.8**2 + 1 - alpha_bar).sqrt()
    kl_divergence(Normal(a * mean, spread), Normal(a * -0.2, teacher_spread)).backward()

    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, 100_000, 1, 1, 1, generator=generator)
    x0 = 0.7 + 0.3 * u
    score = distillation(gaussian_model(-0.2, 0.8), gaussian_model(0.7, 0.3), gradient="noise")
    timesteps = torch.full((len(x0),), timestep)
    gradient = score.gradient(x0, conditions_of(len(x0)), timesteps, noise)
    # The difference of noises is s / a of the divergence's gradient (the module's docstring).
    factor = (alpha_bar / (1 - alpha_bar)).sqrt()
    assert (factor * gradient).mean() == pytest.approx(mean.grad.item(), rel=0.02, abs=2e-3)
    assert (factor * gradient * u).mean() == pytest.approx(
        deviation.grad.item(), rel=0.02, abs=2e-3
    )


def test_descending_it_moves_a_student_onto_the_teacher() -> None:
    # Both parameters, the fake score being exact all the way: mean and spread must arrive.
    mean = torch.tensor(1.5, requires_grad=True)
    deviation = torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.Adam([mean, deviation], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        u, noise = torch.randn(2, 256, 1, 2, 2, generator=generator)
        timestep = torch.randint(0, 3, (256,), generator=generator)
        fake = gaussian_model(mean.item(), deviation.item())
        score = distillation(gaussian_model(-0.2, 0.8), fake)
        x0 = mean + deviation * u
        gradient = score.gradient(x0.detach(), conditions_of(256), timestep, noise)
        optimizer.zero_grad()
        (x0 * gradient).mean().backward()
        optimizer.step()
    assert mean.item() == pytest.approx(-0.2, abs=0.1)
    assert abs(deviation.item()) == pytest.approx(0.8, abs=0.1)


def test_it_is_zero_where_both_scores_agree() -> None:
    model = gaussian_model(0.1, 0.5)
    x0, noise = torch.randn(2, 3, 4, 2, 2)
    gradient = distillation(model, model).gradient(x0, conditions_of(3), torch.arange(3), noise)
    assert torch.equal(gradient, torch.zeros_like(x0))


def test_dmd_divides_by_each_rows_own_error() -> None:
    x0, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    teacher = gaussian_model(0.0, 1.0)
    fake = gaussian_model(0.5, 0.5)
    timestep = torch.tensor([0, 2])
    alpha_bar = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
    z = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    real = predict_x0(z, teacher(z, timestep, EMPTY), alpha_bar, "epsilon")
    own = predict_x0(z, fake(z, timestep, EMPTY), alpha_bar, "epsilon")
    expected = []
    for row in range(2):
        size = (x0[row] - real[row]).abs().mean()
        expected.append(((x0[row] - real[row]) - (x0[row] - own[row])) / size)
    got = distillation(teacher, fake).gradient(x0, conditions_of(2), timestep, noise)
    torch.testing.assert_close(got, torch.stack(expected))


def test_guidance_is_used_below_its_timestep_alone() -> None:
    def teacher(z: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        # The real prompt's context is 1, the empty one's 0.
        shift = conditions.context_BLD.view(-1, 1, 1, 1)
        return gaussian_model(0.0, 1.0)(z, timestep, conditions) + shift

    fake = gaussian_model(0.0, 1.0)
    x0, noise = torch.randn(2, 2, 1, 2, 2)
    timestep = torch.tensor([0, 2])
    settings = {"gradient": "noise", "guidance_below": 2}
    gradient = distillation(teacher, fake, guidance=3.0, **settings).gradient(
        x0, conditions_of(2), timestep, noise
    )
    # Noise of teacher minus fake: 0 + 3 * 1 with guidance, 1 without.
    torch.testing.assert_close(gradient[0], torch.full((1, 2, 2), 3.0))
    torch.testing.assert_close(gradient[1], torch.full((1, 2, 2), 1.0))


@pytest.mark.parametrize("gradient", ["dmd", "noise"])
def test_guidance_alone_is_the_gradient_against_the_frozen_model(gradient: str) -> None:
    def teacher(z: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        shift = conditions.context_BLD.view(-1, 1, 1, 1)
        return gaussian_model(0.0, 1.0)(z, timestep, conditions) + shift

    x0, noise = torch.randn(2, 2, 1, 2, 2)
    given = (x0, conditions_of(2), torch.tensor([0, 2]), noise)
    settings = {"gradient": gradient, "guidance_below": 2}
    alone = distillation(teacher, None, guidance=3.0, **settings).gradient(*given)
    frozen = distillation(teacher, teacher, guidance=3.0, **settings).gradient(*given)
    torch.testing.assert_close(alone, frozen)
    # Above the timestep there is no guidance, and nothing is left.
    assert alone[0].any()
    assert not alone[1].any()


def test_without_guidance_the_empty_prompt_costs_nothing() -> None:
    calls: list[Tensor] = []
    teacher = gaussian_model(0.0, 1.0, calls)
    fake = gaussian_model(0.0, 1.0)
    x0, noise = torch.randn(2, 2, 1, 2, 2)
    for guided in (distillation(teacher, fake), distillation(teacher, fake, 5.0)):
        guided.gradient(x0, conditions_of(2), torch.tensor([0, 1]), noise)
    # The settings' own guidance wins.
    own = ScoreDistillation(
        ScoreSettings(weight=1, guidance=1.0),
        teacher,
        fake,
        guidance=5.0,
        alpha_bar_T=ALPHA_BAR,
        prediction_type="epsilon",
        unguided=EMPTY,
    )
    own.gradient(x0, conditions_of(2), torch.tensor([0, 1]), noise)
    assert [len(conditions) for conditions in calls] == [2, 4, 2]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_predict_x0_turns_into_x0(prediction_type: str) -> None:
    x0, noise = torch.randn(2, 3, 4, 2, 2)
    alpha_bar = ALPHA_BAR.view(-1, 1, 1, 1)
    target = prediction_target(x0, alpha_bar, noise, prediction_type)
    z = noised(x0, alpha_bar, noise)
    torch.testing.assert_close(predict_x0(z, target, alpha_bar, prediction_type), x0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_fake_score_learns_the_best_prediction(prediction_type: str) -> None:
    # Of all affine functions of z, least squares finds the conditional mean of a Gaussian; the
    # loss must be least there.
    generator = torch.Generator().manual_seed(2)
    u, noise = torch.randn(2, 4000, 1, 1, 1, generator=generator)
    x0 = 0.4 + 0.6 * u
    exact = gaussian_model(0.4, 0.6)
    alpha_bar = ALPHA_BAR[1]

    def as_type(shift: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def predict(z: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
            eps = exact(z, timestep, conditions) + shift
            if prediction_type == "epsilon":
                return eps
            mean = predict_x0(z, eps, alpha_bar, "epsilon")
            return prediction_target(mean, alpha_bar, eps, prediction_type)

        return predict

    losses = []
    for shift in (-0.3, 0.0, 0.3):
        score = ScoreDistillation(
            ScoreSettings(weight=1),
            exact,
            as_type(shift),
            guidance=1.0,
            alpha_bar_T=ALPHA_BAR,
            prediction_type=prediction_type,
            unguided=EMPTY,
        )
        timestep = torch.ones(len(x0), dtype=torch.int64)
        losses.append(score.fake_loss(x0, conditions_of(len(x0)), timestep, noise).item())
    assert losses[1] < min(losses[0], losses[2])
