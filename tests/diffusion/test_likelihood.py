"""The bound and the ODE's likelihood against data whose likelihood is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import Mixture, gaussian, two_modes
from scipy.stats import norm

from latentgen.diffusion.likelihood import (
    bits,
    continuous_bound,
    decoder_nats,
    discrete_bound,
    flow_likelihood,
    laplace_nats,
    step_divergence,
)
from latentgen.diffusion.loss import learned_schedule
from latentgen.diffusion.schedule import (
    VE,
    Cosine,
    Linear,
    RectifiedFlow,
    SubVP,
    UniformLogsnr,
    from_config,
    straight_line,
    variance_exploding,
    variance_preserving,
)
from latentgen.errors import InputError

DIMS = 6


def data_and_truth(data: Mixture, rows: int, seed: int = 0) -> tuple[torch.Tensor, float]:
    """x0 (rows, 1, DIMS) and its exact −log p in bits a dimension, as a density."""
    x0 = torch.from_numpy(data.draw((rows, 1, DIMS), seed))
    exact = data.log_density(x0, 39.9)
    return x0, float(-exact.mean()) / (DIMS * math.log(2))


@pytest.mark.parametrize("build", [lambda m: gaussian(0.3, 0.5, m), two_modes], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("variance", "limit"), [("fixed-small", 0.2), ("fixed-large", 0.05)])
def test_the_discrete_bound_is_above_the_likelihood_and_closes_in_on_it(
    build: Any, variance: str, limit: float
) -> None:
    data = build(variance_preserving)
    x0, exact = data_and_truth(data, 3000)
    gaps = []
    for steps in (10, 30, 90, 270):
        levels = np.append(np.linspace(-9, 9, steps), 40.0)
        generator = torch.Generator().manual_seed(1)
        bound = discrete_bound(
            data.denoise, x0, levels, variance_preserving, generator=generator, bins=None, variance=variance
        )
        assert bound.total.mean > exact - 0.015  # the noise of its draws
        assert bound.total.mean == pytest.approx(
            bound.prior.mean + bound.diffusion.mean + bound.reconstruction.mean, abs=1e-9
        )
        gaps.append(bound.total.mean - exact)
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] - 0.015 and abs(gaps[3]) < limit


def test_the_bound_of_a_worse_model_is_worse() -> None:
    data = gaussian(0.3, 0.5, variance_preserving)
    x0, exact = data_and_truth(data, 300)
    levels = np.append(np.linspace(-9, 9, 200), 40.0)
    totals = []
    for error in (0.0, 0.1, 0.3):
        generator = torch.Generator().manual_seed(1)
        estimate = lambda x, logsnr, error=error: data.denoise(x, logsnr) + error  # noqa: E731
        totals.append(discrete_bound(estimate, x0, levels, variance_preserving, generator=generator, bins=None))
    assert totals[0].total.mean < totals[1].total.mean < totals[2].total.mean
    assert totals[0].total.mean >= exact - 2 * totals[0].total.error


def test_a_ddpm_table_has_a_bound_too() -> None:
    config = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "variance_type": "fixed_large"}
    plan = from_config(config)
    data = gaussian(0.0, 0.4, variance_preserving)
    x0, exact = data_and_truth(data, 200)
    bound = discrete_bound(
        data.denoise,
        x0,
        plan.knots(1000),
        plan.schedule.marginal,
        generator=torch.Generator().manual_seed(0),
        bins=None,
        variance=str(plan.options["variance"]),
    )
    assert exact - 2 * bound.total.error < bound.total.mean < exact + 0.1 and bound.prior.mean < 1e-4


def test_step_divergence_is_the_divergence_of_two_gaussians() -> None:
    x0, guess, x = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    now, later = torch.full((4,), -1.0, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    small = step_divergence(x0, guess, x, now, later, variance_preserving)
    snr_gap = math.exp(0.5) - math.exp(-1.0)  # Kingma et al. 2021, eq. 13: half of it times the squared error
    assert torch.allclose(small, 0.5 * snr_gap * (x0 - guess).square().sum((1, 2)))
    low = torch.full_like(x, -1.0)
    learned = step_divergence(x0, guess, x, now, later, variance_preserving, variance="learned-range", v=low)
    assert torch.allclose(learned, small)
    (a, s), (b, r) = variance_preserving(-1.0), variance_preserving(0.5)
    beta, tilde = s**2 * -math.expm1(-1.5), r**2 * -math.expm1(-1.5)
    mean_gap = (b - r * math.sqrt(1 - -math.expm1(-1.5)) / s * a) * (x0 - guess)
    p, q = (torch.distributions.Normal(m, math.sqrt(v)) for m, v in ((mean_gap, beta), (0 * mean_gap, tilde)))
    expected = torch.distributions.kl_divergence(q, p).sum((1, 2))
    assert torch.allclose(
        step_divergence(x0, guess, x, now, later, variance_preserving, variance="fixed-large"), expected
    )
    with pytest.raises(InputError):
        step_divergence(x0, guess, x, now, later, variance_preserving, variance="large")


def test_the_decoder_over_grey_levels_sums_to_one() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    for mean, std in ((0.1, 0.02), (-1.0, 0.3), (0.99, 0.001)):
        log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
        mass = torch.exp(-decoder_nats(levels, torch.tensor(mean, dtype=torch.float64), log_variance, 256))
        assert float(mass.sum()) == pytest.approx(1, abs=1e-6)


def test_the_decoder_charges_what_lies_far_out_in_full() -> None:
    """−log of a bin's mass, k standard deviations away on either side, against SciPy's in float64."""
    std, x0 = 0.01, torch.tensor([[3 / 255]])
    for k in (0.0, 0.3, 4.5, 6.0, 10.0, 30.0):
        inner, outer = norm.logsf((k * std - 1 / 255) / std), norm.logsf((k * std + 1 / 255) / std)
        expected = -(inner + math.log1p(-math.exp(outer - inner)))
        for side in (-1, 1):
            found = decoder_nats(x0, x0 + side * k * std, torch.full_like(x0, 2 * math.log(std)), 256)
            assert float(found) == pytest.approx(expected, rel=1e-4)


def test_laplace_decoders_over_grey_levels_sum_to_one_and_are_those_of_torch() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    for mean in (-1.0, -0.99, 0.003, 0.5, 1.0):
        masses = []
        for scale in (0.002, 0.05, 1.0):
            mass = torch.exp(-laplace_nats(levels, torch.full_like(levels, mean), torch.tensor([scale])))
            assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
            law = torch.distributions.Laplace(torch.tensor(mean).double(), torch.tensor(scale).double())
            edges = law.cdf(torch.linspace(-1 - 1 / 255, 1 + 1 / 255, 257, dtype=torch.float64))
            edges[0], edges[-1] = 0, 1
            torch.testing.assert_close(mass, edges.diff(), atol=1e-7, rtol=1e-4)
            masses.append(mass)
        both = laplace_nats(levels, torch.full_like(levels, mean), torch.tensor([0.002, 1.0]))
        torch.testing.assert_close(torch.exp(-both), (masses[0] + masses[2]) / 2, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("build", [lambda m: gaussian(0.3, 0.5, m), two_modes], ids=["gaussian", "mixture"])
def test_the_continuous_bound_meets_the_likelihood(build: Any) -> None:
    data = build(variance_preserving)
    x0, exact = data_and_truth(data, 3000)
    schedule = UniformLogsnr(-10.0, 12.0)
    bound = continuous_bound(
        data.denoise, schedule, x0, generator=torch.Generator().manual_seed(0), samples=8, bins=None
    )
    # times spread evenly over the batch make the mean far better than the rows' own spread says
    assert abs(bound.total.mean - exact) < 0.03 and bound.total.error < 0.2


def test_the_continuous_bound_depends_on_the_schedules_ends_alone() -> None:
    """Kingma et al. 2021, section 5.1: three schedules of the same ends, one of them a random network."""
    data = two_modes(variance_preserving)
    x0, _ = data_and_truth(data, 4000)
    learned, weights = learned_schedule(64, logsnr_min=-8.0, logsnr_max=7.0, seed=3)
    for weight in weights:
        weight.requires_grad_(False).mul_(3)  # far from the line it starts as

    class Bent(UniformLogsnr):
        def logsnr(self, t: Any) -> Any:
            return super().logsnr(0.3 * t + 0.7 * t**2)

    totals = []
    for schedule in (UniformLogsnr(-8.0, 7.0), Bent(-8.0, 7.0), learned):
        bound = continuous_bound(
            data.denoise, schedule, x0, generator=torch.Generator().manual_seed(0), samples=8, bins=None
        )
        totals.append(bound)
    for other in totals[1:]:
        gap = abs(other.diffusion.mean - totals[0].diffusion.mean)
        assert gap < 4 * math.hypot(other.diffusion.error, totals[0].diffusion.error) and gap < 0.05
        assert other.reconstruction.mean == pytest.approx(totals[0].reconstruction.mean, abs=1e-4)
    further = continuous_bound(
        data.denoise, UniformLogsnr(-8.0, 1.0), x0, generator=torch.Generator().manual_seed(0), samples=8, bins=None
    )
    assert further.total.mean > totals[0].total.mean + 0.05  # other ends, another bound


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), SubVP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_the_continuous_bound_wants_an_end_that_has_noise(schedule: Any) -> None:
    x0, _ = data_and_truth(two_modes(schedule.marginal), 4)
    with pytest.raises(InputError, match="give UniformLogsnr between its two ends"):
        continuous_bound(two_modes(schedule.marginal).denoise, schedule, x0, bins=None)


def test_the_continuous_bound_trains_a_learned_schedule() -> None:
    data = two_modes(variance_preserving)
    x0, _ = data_and_truth(data, 16)
    schedule, weights = learned_schedule(16, logsnr_min=-8.0, logsnr_max=7.0)
    bound = continuous_bound(data.denoise, schedule, x0, generator=torch.Generator().manual_seed(0), bins=None)
    bound.diffusion.rows.square().mean().backward()  # the variance is what its interior is trained on
    assert all(weight.grad is not None and bool(torch.isfinite(weight.grad).all()) for weight in weights)


def test_bytes_have_a_bound_near_the_entropy_of_their_grey_levels() -> None:
    """Two grey levels with equal odds: one bit a dimension, and the optimal denoiser reaches it."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    pair = (float(levels[100]), float(levels[180]))
    data = Mixture(pair, (1e-9, 1e-9), (0.5, 0.5), variance_preserving)
    x0 = torch.from_numpy(data.draw((2000, 1, DIMS), 1))
    x0 = levels[(x0[..., None] - levels).abs().argmin(-1)]
    bound = continuous_bound(
        data.denoise, UniformLogsnr(-10.0, 13.0), x0, generator=torch.Generator().manual_seed(0), samples=4
    )
    assert bound.total.mean == pytest.approx(1.0, abs=max(4 * bound.total.error, 0.02))
    ladder = np.append(np.linspace(-10, 13, 400), 40.0)
    generator = torch.Generator().manual_seed(0)
    discrete = discrete_bound(data.denoise, x0[:300], ladder, variance_preserving, generator=generator)
    assert discrete.total.mean == pytest.approx(1.0, abs=0.06) and discrete.total.mean > 0.99


FRAMES = {"vp": variance_preserving, "ve": variance_exploding, "flow": straight_line}


@pytest.mark.parametrize("frame", FRAMES)
def test_the_odes_likelihood_is_the_exact_one(frame: str) -> None:
    data = two_modes(FRAMES[frame])
    x0 = torch.from_numpy(data.draw((32, 1, DIMS), 2))
    exact = bits(-data.log_density(x0, 39.9), DIMS)
    found = flow_likelihood(
        data.denoise, x0, data.marginal, clean=14.0, noisy=-14.0, probes=None, bins=None, rtol=1e-7, atol=1e-7
    )
    assert torch.allclose(found.bits.rows, exact.rows, atol=2e-3)
    guessed = flow_likelihood(
        data.denoise,
        x0,
        data.marginal,
        clean=14.0,
        noisy=-14.0,
        probes=4,
        bins=None,
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(guessed.bits.mean - exact.mean) < 4 * guessed.probe_error + 2e-3


def test_dequantised_bytes_cost_at_least_their_entropy() -> None:
    """Grey levels drawn evenly from 64 neighbours cost six bits; their smooth model is the uniform's mixture."""
    levels = np.linspace(-1, 1, 256)[96:160]
    data = Mixture(tuple(levels), (0.5 * 2 / 255,) * 64, (1 / 64,) * 64, variance_preserving)
    x0 = torch.from_numpy(np.random.default_rng(0).choice(levels, (24, 1, 2)))
    found = flow_likelihood(
        data.denoise,
        x0,
        data.marginal,
        clean=16.0,
        noisy=-12.0,
        probes=None,
        generator=torch.Generator().manual_seed(0),
    )
    assert 5.9 < found.bits.mean < 6.6


def test_bounds_that_cannot_be_are_refused() -> None:
    data, x0 = gaussian(0.0, 1.0, variance_preserving), torch.zeros(2, 1, 3)
    with pytest.raises(InputError, match="clean"):
        discrete_bound(data.denoise, x0, np.array([-3.0, 0.0, 3.0]), variance_preserving)
    with pytest.raises(InputError, match="probes"):
        flow_likelihood(data.denoise, x0, variance_preserving, clean=9.0, noisy=-9.0, probes=0)
    assert math.isnan(bits(torch.ones(1), 3).error)
    assert VE().marginal(0.0)[0] == 1 and Cosine().logsnr(0.5) == pytest.approx(0, abs=1e-9)
