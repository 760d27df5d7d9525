"""Losses and the times they are taken at."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import gaussian

from latentgen.diffusion.denoiser import Condition
from latentgen.diffusion.likelihood import logsnr_and_rate
from latentgen.diffusion.loss import (
    WEIGHTINGS,
    denoising_loss,
    hybrid_loss,
    learned_schedule,
    offset_noise,
    output_weight,
    score_matching_loss,
    sigma_ladder,
    times,
    times_of,
    variational_loss,
)
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import (
    EDM,
    Cosine,
    Discrete,
    Learned,
    RectifiedFlow,
    UniformLogsnr,
    variance_preserving,
)
from latentgen.errors import InputError

NAMES = ["eps", "x0", "v", "flow"]


def draws(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps, torch.linspace(0.1, 0.9, n, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [Discrete.scaled_linear(), Cosine(), RectifiedFlow(3.0)], ids=repr)
def test_the_right_network_has_no_loss_and_a_blank_one_has_its_targets_square(name: str, schedule: Any) -> None:
    x0, eps, t = draws()
    prediction = Prediction(name)
    alpha, sigma = (part.reshape(-1, 1, 1) for part in schedule.marginal(schedule.logsnr(t)))
    target = prediction.target(x0, eps, alpha, sigma)
    right = denoising_loss(lambda x, time, c: target, schedule, prediction, x0, Condition(), t, eps)
    assert right.shape == (6,) and float(right.abs().max()) < 1e-9
    blank = denoising_loss(lambda x, time, c: 0 * x, schedule, prediction, x0, Condition(), t, eps)
    assert torch.allclose(blank.double(), target.square().mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
def test_a_weighting_is_the_same_loss_whatever_is_predicted(weighting: str) -> None:
    """The same x0 error costs the same through eps, x0, v and flow."""
    x0, eps, t = draws()
    schedule = Cosine()
    alpha, sigma = (part.reshape(-1, 1, 1) for part in schedule.marginal(schedule.logsnr(t)))
    x, guess = alpha * x0 + sigma * eps, x0 + 0.1 * torch.sin(eps)
    losses = []
    for name in NAMES:
        out = Prediction(name).join(guess, x, alpha, sigma)
        network = lambda x, time, c, out=out: out  # noqa: E731
        losses.append(denoising_loss(network, schedule, Prediction(name), x0, Condition(), t, eps, weighting=weighting))
    for loss in losses[1:]:
        assert torch.allclose(loss, losses[0], rtol=1e-4)


def test_weightings_are_their_papers_formulas() -> None:
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    schedule = Cosine()
    snr = torch.exp(schedule.logsnr(t))
    expected = {
        ("min-snr", "x0"): snr.clamp(max=5.0),
        ("min-snr", "eps"): snr.clamp(max=5.0) / snr,
        ("min-snr", "v"): snr.clamp(max=5.0) / (snr + 1),
        ("p2", "eps"): 1 / (1 + snr),
        ("edm", "v"): torch.ones(5, dtype=torch.float64),
        ("edm", "x0"): snr + 1,
    }
    for (weighting, name), weight in expected.items():
        assert torch.allclose(output_weight(weighting, schedule, Prediction(name), t), weight, rtol=1e-6), weighting
    rate = math.pi / torch.sin(math.pi * t) * 2
    assert torch.allclose(output_weight("bound", schedule, Prediction("eps"), t), 0.5 * rate)
    sigmoid = output_weight("sigmoid", schedule, Prediction("eps"), t, gamma=1.0)
    assert torch.allclose(sigmoid, 0.5 * rate * torch.sigmoid(1 - schedule.logsnr(t)))
    with pytest.raises(InputError, match="min-snr"):
        output_weight("sharp", schedule, Prediction("eps"), t)


def test_the_rate_is_the_slope_of_logsnr() -> None:
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    for schedule in (Discrete.scaled_linear(), Cosine(), EDM(), RectifiedFlow(2.0)):
        slope = (schedule.logsnr(t - 1e-6) - schedule.logsnr(t + 1e-6)) / 2e-6
        assert torch.allclose(logsnr_and_rate(schedule, t)[1], slope, rtol=1e-3)


def test_times_lie_inside_are_even_and_repeat() -> None:
    t = times(64, generator=torch.Generator().manual_seed(4))
    assert t.dtype == torch.float32 and bool(((t > 0) & (t < 1)).all())
    assert torch.allclose(t.sort().values.diff(), torch.full((63,), 1 / 64), atol=1e-5)
    assert torch.equal(t, times(64, generator=torch.Generator().manual_seed(4)))
    alone = times(2000, low_discrepancy=False, generator=torch.Generator().manual_seed(4))
    assert abs(float(alone.mean()) - 0.5) < 0.03


def test_densities_have_their_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    logit = torch.logit(times(4000, density="logit-normal", generator=generator, mean=0.5, std=1.3))
    assert abs(float(logit.mean()) - 0.5) < 0.02 and abs(float(logit.std()) - 1.3) < 0.02
    t = times(4000, density="lognormal-sigma", generator=generator, schedule=EDM(), mean=-0.5, std=1.2)
    log_sigma = -0.5 * EDM().logsnr(t)
    assert abs(float(log_sigma.mean()) + 0.5) < 0.02 and abs(float(log_sigma.std()) - 1.2) < 0.02
    levels = torch.linspace(-5, 5, 7)
    assert torch.allclose(Cosine().logsnr(times_of(Cosine(), levels)), levels, atol=1e-3)
    for options in ({"density": "flat"}, {"density": "lognormal-sigma"}):
        with pytest.raises(InputError):
            times(3, **options)  # type: ignore[arg-type]


def test_offset_noise_is_one_number_more_a_channel() -> None:
    eps = torch.zeros(500, 4, 3, 3)
    offset = offset_noise(eps, 0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(offset, offset[:, :, :1, :1].expand_as(offset)) and abs(float(offset.std()) - 0.1) < 0.01


def test_score_matching_on_a_ladder_is_least_at_the_true_score() -> None:
    ladder = sigma_ladder(0.01, 10.0, 8)
    assert float(ladder[0]) == pytest.approx(10) and float(ladder[-1]) == pytest.approx(0.01)
    assert torch.allclose(ladder[1:] / ladder[:-1], (ladder[1] / ladder[0]).expand(7))
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 + 0.5 * torch.randn(4000, 1, generator=generator)
    eps, rung = torch.randn(4000, 1, generator=generator), torch.arange(4000) % 8

    def score(scale: float) -> Any:
        return lambda x, sigma, c: -scale * (x - 0.3) / (0.25 + sigma[:, None] ** 2)

    losses = [
        float(score_matching_loss(score(scale), x0, Condition(), ladder, rung, eps).mean()) for scale in (0.8, 1.0, 1.2)
    ]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    sigma = ladder[rung][:, None]
    exact = 0.5 * (0.25 / (0.25 + sigma**2)).mean()  # the part of eps that x cannot tell
    assert losses[1] == pytest.approx(float(exact), rel=0.06)


def test_the_hybrid_loss_trains_the_variance_and_leaves_the_mean_to_the_simple_loss() -> None:
    x0, eps, _ = draws()
    schedule, now, later = UniformLogsnr(), torch.full((6,), -1.0), torch.full((6,), -0.4)
    denoise = gaussian(0.0, 1.0, variance_preserving).denoise
    prediction = Prediction("eps")

    def losses(v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def network(x: Any, time: Any, c: Condition) -> Any:
            alpha, sigma = variance_preserving(-1.0)
            out = prediction.join(denoise(x, -1.0), x, alpha, sigma)
            return torch.cat([out + bias, v.expand_as(x)], dim=1)

        args = (network, schedule, prediction, x0, Condition(), now.double(), later.double(), eps)
        return hybrid_loss(*args, weight=1.0).mean()

    v, bias = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    losses(v, bias).backward()
    simple_only = torch.zeros((), requires_grad=True)
    alpha, sigma = variance_preserving(-1.0)
    out = prediction.join(denoise(alpha * x0 + sigma * eps, -1.0), alpha * x0 + sigma * eps, alpha, sigma)
    (out + simple_only - eps).square().mean().backward()
    assert v.grad is not None and float(v.grad.abs()) > 1e-4
    assert bias.grad is not None and torch.allclose(bias.grad, simple_only.grad, atol=1e-6)
    # the variance that the bound asks for: between the two fixed ones, and where its slope vanishes
    grid = [float(losses(torch.tensor(float(value)), torch.zeros(()))) for value in np.linspace(-1, 1, 21)]
    best = int(np.argmin(grid))
    assert 0 < best <= 20 and grid[best] < grid[0]
    with pytest.raises(InputError, match="twice"):
        hybrid_loss(lambda x, time, c: x, schedule, prediction, x0, Condition(), now, later, eps)


def test_a_weighted_loss_can_be_taken_without_gradients() -> None:
    x0, eps, t = draws()
    with torch.inference_mode():
        loss = denoising_loss(
            lambda x, time, c: x, Cosine(), Prediction("v"), x0, Condition(), t, eps, weighting="min-snr"
        )
    assert bool(torch.isfinite(loss).all())


def test_the_variational_loss_teaches_the_network_the_bound_and_the_schedule_its_variance() -> None:
    """By finite differences: of the terms' mean for the network, of their squares' mean for the schedule."""
    x0, eps, t = draws()
    told, prediction = learned_schedule(8)[1], Prediction("eps")
    weights = [weight.detach().double().requires_grad_() for weight in told]
    gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def terms(gain: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        schedule = Learned(*parts, -6.0, 8.0)
        network = lambda x, time, c: gain * torch.sin(x) + 1e-4 * time.reshape(-1, 1, 1)  # noqa: E731
        return variational_loss(network, schedule, prediction, x0, Condition(), t, eps)

    terms(gain, weights).mean().backward()
    step = 1e-5
    fixed = [weight.detach() for weight in weights]
    slope = (terms(gain.detach() + step, fixed).mean() - terms(gain.detach() - step, fixed).mean()) / (2 * step)
    assert gain.grad is not None and float(gain.grad) == pytest.approx(float(slope.detach()), rel=1e-4)
    for place in (0, 2, 4):  # w1, w2, w3
        ends = []
        for sign in (1, -1):
            moved = [weight.clone() for weight in fixed]
            moved[place][0] += sign * step
            ends.append(float(terms(gain.detach(), moved).square().mean().detach()))
        found = weights[place].grad
        assert found is not None
        assert float(found[0]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-7)


def test_a_teachers_answers_stand_for_the_last_rows() -> None:
    cosine, v = Cosine(), Prediction("v")
    x0, eps, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.linspace(0.1, 0.9, 5)
    states = torch.arange(5.0)[:, None, None]

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        assert condition.states is not None
        return 0.3 * x + time[:, None, None, None] * condition.states[..., None]

    def halved(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        return 0.5 * network(x, time, condition)

    told = Condition(states)
    plain = denoising_loss(network, cosine, v, x0, told, t, eps)
    itself = denoising_loss(network, cosine, v, x0, told, t, eps, teacher=network, taught=2)
    torch.testing.assert_close(itself[:3], plain[:3])
    torch.testing.assert_close(itself[3:], torch.zeros(2))
    other = denoising_loss(network, cosine, v, x0, told, t, eps, teacher=halved, taught=2)
    alpha, sigma = (value[:, None, None, None] for value in cosine.marginal(cosine.logsnr(t)))
    answers = network(alpha * x0 + sigma * eps, cosine.time(cosine.logsnr(t)), told)
    torch.testing.assert_close(other[3:], (0.5 * answers).square().flatten(1).mean(1)[3:])
