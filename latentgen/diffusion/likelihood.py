"""How likely data is under a model: the variational bound, in discrete and continuous time, and the ODE's exact value.

All inner quantities are nats summed over a picture, (B,); what is reported is bits per dimension with its standard
error over the batch. x0 is data in [−1, 1]; `bins` says it has that many grey levels (256 for bytes), None that it is
continuous, and then bits are those of a density.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from latentgen.diffusion.array import column
from latentgen.diffusion.sampling.adaptive import dormand_prince
from latentgen.diffusion.sampling.walk import Marginal, legs
from latentgen.diffusion.schedule.continuous import Learned
from latentgen.diffusion.schedule.protocol import LOGSNR_MAX, Schedule, variance_preserving
from latentgen.errors import InputError

Tensor = torch.Tensor
Dequantisation = Literal["uniform", "noised"]
Estimate = Callable[[Tensor, Any], Any]  # (x (B, …), logsnr, a float or (B,)) -> x0; (x0, v) with learned variances


class Bits(NamedTuple):
    """Bits per dimension: the mean over the batch, its standard error, and each row's own (B,)."""

    mean: float
    error: float
    rows: Tensor


class Bound(NamedTuple):
    """The terms of −log p(x0) <= prior + diffusion + reconstruction (L_T, L_{T−1} … L_1, and L_0), and their sum."""

    total: Bits
    prior: Bits
    diffusion: Bits
    reconstruction: Bits


def bits(nats: Tensor, dims: int) -> Bits:
    """Nats a picture (B,) as bits a dimension."""
    rows = nats.double() / (dims * math.log(2))
    error = float(rows.detach().std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Bits(float(rows.detach().mean()), error, rows)


def logsnr_and_rate(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """logsnr(t) and −dlogsnr/dt, both (B,). Gradients reach the weights of a learned schedule."""
    learned = isinstance(schedule, Learned)
    with torch.enable_grad():
        place = t.detach().requires_grad_()
        logsnr = schedule.logsnr(place)
        rate = -torch.autograd.grad(logsnr.sum(), place, create_graph=learned)[0]
    return (logsnr, rate) if learned else (logsnr.detach(), rate)


def step_divergence(
    x0: Tensor,
    estimate: Tensor,
    x: Tensor,
    logsnr: Tensor,
    next_logsnr: Tensor,
    marginal: Marginal,
    *,
    variance: str = "fixed-small",
    v: Tensor | None = None,
) -> Tensor:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of one reverse step, nats summed over a picture: (B,).

    Both means are the posterior's (Ho et al. 2020, eq. 7), with x0 and with its estimate; q's variance is the
    posterior's, p's is `variance` ("fixed-small", "fixed-large", or "learned-range" with v in [−1, 1]).
    """
    alpha, sigma = (column(value, x) for value in marginal(logsnr))
    next_alpha, next_sigma = (column(value, x) for value in marginal(next_logsnr))
    ratio = -torch.expm1(column(logsnr - next_logsnr, x))
    small, large = next_sigma**2 * ratio, sigma**2 * ratio
    share = next_sigma * (1 - ratio).sqrt() / sigma  # sqrt(sigma_s² − small)/sigma
    gap = (next_alpha - share * alpha) * (x0 - estimate)
    log_variance = reverse_log_variance(small, large, variance, v)
    divergence = log_variance - small.log() + (small + gap**2) * torch.exp(-log_variance) - 1
    return 0.5 * divergence.expand_as(x).flatten(1).sum(1)


def reverse_log_variance(small: Tensor, large: Tensor, variance: str, v: Tensor | None) -> Tensor:
    """log of the reverse step's variance; "learned-range" is Nichol & Dhariwal 2021, eq. 15."""
    if variance == "learned-range":
        if v is None:
            raise InputError("learned-range variances need the network's second half")
        return 0.5 * (v + 1) * large.log() + 0.5 * (1 - v) * small.log()
    if variance not in ("fixed-small", "fixed-large"):
        raise InputError(f"unknown variance {variance!r}; it can be fixed-small, fixed-large or learned-range")
    return (small if variance == "fixed-small" else large).log()


def prior_divergence(x0: Tensor, logsnr: float, marginal: Marginal) -> Tensor:
    """L_T = KL(q(x_T | x0) || N(0, sigma_T² + alpha_T²)), nats (B,): the noise left to know x0 by, at the first level.

    In the VP frame the prior is N(0, 1); in another it is that, in that frame.
    """
    alpha, sigma = (float(value) for value in marginal(logsnr))
    spread = alpha**2 + sigma**2
    ratio = sigma**2 / spread
    return 0.5 * (ratio - 1 - math.log(ratio) + (alpha * x0) ** 2 / spread).flatten(1).sum(1)


def decoder_nats(x0: Tensor, mean: Tensor, log_variance: Tensor, bins: int | None) -> Tensor:
    """−log p(x0) under a Gaussian decoder, nats (B,): a density, or its mass over the grey level's bin.

    The outermost bins reach to infinity (Ho et al. 2020, eq. 13).
    """
    if bins is None:
        squared = (x0 - mean) ** 2 * torch.exp(-log_variance)
        return 0.5 * (squared + log_variance + math.log(2 * math.pi)).flatten(1).sum(1)
    scale, half, log_ndtr = torch.exp(-0.5 * log_variance), 1 / (bins - 1), torch.special.log_ndtr
    away = (x0 - mean).abs()  # the bin lies in the lower tail, where log_ndtr has no bound
    near, far = log_ndtr(scale * (half - away)), log_ndtr(scale * (-half - away))
    mass = near + torch.log(-torch.expm1(far - near))
    mass = torch.where(x0 < -1 + half, log_ndtr(scale * (x0 - mean + half)), mass)
    mass = torch.where(x0 > 1 - half, log_ndtr(scale * (mean - x0 + half)), mass)
    return -mass.flatten(1).sum(1)


def laplace_nats(x0: Tensor, mean: Tensor, scales: Tensor, bins: int = 256) -> Tensor:
    """−log p(x0) under Laplace decoders about one mean, mixed in equal parts, their masses over grey levels: nats (B,).

    scales (S,): of each decoder, for all pixels of a picture. A mixture is a likelihood whichever of them suits, and
    costs log S nats a picture at most. The outermost bins reach to infinity.
    """
    half, per_scale = 1 / (bins - 1), []
    away = (x0 - mean).abs()
    inwards = torch.where(x0 > 1 - half, mean - x0, torch.where(x0 < -1 + half, x0 - mean, away))
    outermost = (x0 > 1 - half) | (x0 < -1 + half)
    for scale in scales.tolist():
        y, d = half / scale, away / scale
        tail = -d + y + math.log(-math.expm1(-2 * y)) - math.log(2)  # sinh(y)·exp(−d): the bin lies on one side
        peak = torch.log1p(-math.exp(-y) * torch.cosh(d.clamp(max=y)))  # the mean is in the bin
        e = (-inwards / scale - y).clamp(max=60)  # how far the open bin's edge lies beyond the mean
        rest = torch.where(e > 0, -e - math.log(2), torch.log1p(-0.5 * torch.exp(e.clamp(max=0))))
        mass = torch.where(outermost, rest, torch.where(d > y, tail, peak))
        per_scale.append(mass.double().flatten(1).sum(1))
    return math.log(len(scales)) - torch.logsumexp(torch.stack(per_scale), dim=0)


@torch.no_grad()
def discrete_bound(
    estimate: Estimate,
    x0: Tensor,
    knots: np.ndarray,
    marginal: Marginal,
    *,
    generator: torch.Generator | None = None,
    bins: int | None = 256,
    variance: str = "fixed-small",
) -> Bound:
    """L_vlb = L_0 + … + L_T over a ladder of levels (Ho et al. 2020, eq. 5), one draw of each term.

    knots: as for a sampler, the last one clean; its last step is the decoder's. Its mean is the estimate of x0, its
    variance beta_1 = sigma_1² (a posterior's would be 0 there; a learned one ranges up to beta_1 from the step
    before's, as Nichol & Dhariwal clip it). One evaluation a level.
    """
    walk = list(legs(knots, marginal))
    if not walk[-1].to_clean or len(walk) < 2:
        raise InputError("the bound needs two or more levels and a clean last knot")
    diffusion = torch.zeros(len(x0), dtype=torch.float64)
    small = walk[-2].next_sigma ** 2 * walk[-2].ratio
    for leg in walk:
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        x = leg.alpha * x0 + leg.sigma * eps.to(x0)
        value = estimate(x, leg.logsnr)
        guess, v = value if variance == "learned-range" else (value, None)
        if leg.to_clean:
            ends = torch.tensor(small, dtype=x.dtype), torch.tensor(leg.sigma**2, dtype=x.dtype)
            decoder = "learned-range" if variance == "learned-range" else "fixed-large"
            log_variance = reverse_log_variance(*ends, decoder, v)
            reconstruction = decoder_nats(x0, guess, log_variance.to(x0), bins)
        else:
            now, later = (torch.full((len(x0),), level, dtype=torch.float64) for level in (leg.logsnr, leg.next_logsnr))
            wide = (x0.double().cpu(), guess.double().cpu(), x.double().cpu())
            v = None if v is None else v.double().cpu()
            diffusion += step_divergence(*wide, now, later, marginal, variance=variance, v=v)
    return _bound(prior_divergence(x0, walk[0].logsnr, marginal), diffusion, reconstruction, x0)


def _bound(prior: Tensor, diffusion: Tensor, reconstruction: Tensor, x0: Tensor) -> Bound:
    dims = x0[0].numel()
    parts = [part.double().cpu() for part in (prior, diffusion, reconstruction)]
    return Bound(bits(parts[0] + parts[1] + parts[2], dims), *(bits(part, dims) for part in parts))


def continuous_bound(
    estimate: Estimate,
    schedule: Schedule,
    x0: Tensor,
    *,
    generator: torch.Generator | None = None,
    samples: int = 1,
    bins: int | None = 256,
) -> Bound:
    """The bound in continuous time (Kingma et al. 2021, eq. 11 and 17), `samples` draws of t a picture.

    diffusion: 1/2·E[−dlogsnr/dt·|eps − eps_hat|²]; its value depends on the schedule's two ends only. Times are spread
    evenly over the batch and the draws, so the mean is better than its standard error, the rows' own spread, says.
    reconstruction: p(x0 | x) at the clean end, proportional to q(x | x0) over the grey levels. Evaluations: samples.
    Gradients flow where the caller's mode lets them, to a learned schedule too. Raises InputError for a schedule
    without a noise it ends at, as Linear, Cosine, SubVP and RectifiedFlow are: no draws hold all that lies there.
    """
    clean, noisy = (_end(schedule, x0, place) for place in (0.0, 1.0))
    if clean >= LOGSNR_MAX:
        raise InputError("the bound needs a schedule that ends at some noise; give UniformLogsnr between its two ends")
    rows = len(x0)
    start = torch.rand(1, generator=generator)
    diffusion = torch.zeros(rows, dtype=torch.float64)
    for draw in range(samples):
        t = ((start + torch.arange(rows) / rows + draw / (rows * samples)) % 1.0).clamp(1e-6, 1 - 1e-6)
        logsnr, rate = logsnr_and_rate(schedule, t.to(x0))
        alpha, sigma = (column(value, x0) for value in schedule.marginal(logsnr))
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0)
        guess = estimate(alpha * x0 + sigma * eps, logsnr)
        squared = ((alpha / sigma * (x0 - guess)) ** 2).flatten(1).sum(1)  # |eps − eps_hat|²
        diffusion = diffusion + (0.5 * rate * squared / samples).double().cpu()
    reconstruction = bayes_decoder_nats(x0, clean, schedule.marginal, bins, generator)
    return _bound(prior_divergence(x0, noisy, schedule.marginal), diffusion, reconstruction, x0)


def _end(schedule: Schedule, x0: Tensor, place: float) -> float:
    return float(schedule.logsnr(torch.full((1,), place, dtype=x0.dtype, device=x0.device)).detach())


def bayes_decoder_nats(
    x0: Tensor, logsnr: float, marginal: Marginal, bins: int | None, generator: torch.Generator | None
) -> Tensor:
    """−log p(x0 | x) with p(x0 | x) ∝ q(x | x0), x drawn at the clean end (Kingma et al. 2021, section 3.3): (B,)."""
    alpha, sigma = (float(value) for value in marginal(logsnr))
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0)
    centre, spread = x0 + sigma / alpha * eps, sigma / alpha
    if bins is None:
        return decoder_nats(x0, centre, torch.full_like(x0[:1], 2 * math.log(spread)), None)
    levels = torch.linspace(-1, 1, bins, dtype=x0.dtype, device=x0.device)
    logits = -0.5 * ((centre[..., None] - levels) / spread) ** 2
    own = -0.5 * eps**2
    return (torch.logsumexp(logits, -1) - own).flatten(1).sum(1)


class FlowLikelihood(NamedTuple):
    """The ODE's likelihood: bits per dimension, and the standard error that the random probes add to their mean.

    between: of "noised" data the part E[log q(z | x0) − log p(z)], which stands where a bound has prior + diffusion.
    """

    bits: Bits
    probe_error: float
    between: Bits | None = None


def flow_likelihood(
    denoise: Estimate,
    x0: Tensor,
    marginal: Marginal,
    *,
    clean: float,
    noisy: float,
    probes: int | None = 1,
    bins: int | None = 256,
    dequantisation: Dequantisation = "uniform",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> FlowLikelihood:
    """log p(x0) by the probability-flow ODE and the change of variables (Song et al. 2021, eq. 39 to 40).

    The ODE runs in the VP frame from `clean` to `noisy` (logSNR), where x is taken to be N(0, 1); its divergence is
    Hutchinson's estimate over `probes` Rademacher vectors (Grathwohl et al. 2019), the same all the way, or the exact
    trace for None (as many gradients as there are dimensions).

    With `bins`, p(x0) is the mass of its grey levels, and the ODE's density at `clean` bounds it. dequantisation
    "uniform": −log P(x0) <= −E log p(x0 + a uniform part of its level); a network that knows a level better than the
    noise at `clean` pays for that noise (docs/diffusion.md, section 8). "noised": z is drawn from q(z | x0) at `clean`,
    and −log P(x0) <= E[log q(z | x0) − log p(z) − log p(x0 | z)] with the decoder of `continuous_bound`: the start and
    the end of that bound, the ODE in place of the SDE between them (Zheng et al. 2023 do so with truncated noise).

    It is the likelihood of what the ODE draws. The bound is of what the SDE draws: with a network that is not exact
    these are two densities, and the bound may lie on either side of this one (Song, Durkan
    et al. 2021, theorem 1).
    """
    dims, rows = x0[0].numel(), len(x0)
    x0, before, decoder = _dequantised(x0, dequantisation, clean, marginal, bins, generator)
    vectors = _probes(x0, probes, generator)

    def slope(y: Tensor, logsnr: float) -> Tensor:
        alpha, scale = variance_preserving(logsnr)[0], float(marginal(logsnr)[0]) / variance_preserving(logsnr)[0]
        x = y[:, :dims].reshape(x0.shape)
        guess, traces = _value_and_traces(lambda x: denoise(scale * x, logsnr), x, vectors)
        flow = 0.5 * alpha * (guess - alpha * x)
        return torch.cat([flow.flatten(1), 0.5 * alpha * (traces - alpha * dims)], dim=1)

    alpha = variance_preserving(clean)[0]
    y = torch.cat([(alpha * x0).flatten(1), x0.new_zeros(rows, len(vectors) if probes else 1)], dim=1)
    for step in dormand_prince(slope, y, clean, noisy, rtol=rtol, atol=atol):
        y = step.y
    end, divergence = y[:, :dims], y[:, dims:]
    prior = -0.5 * (end**2 + math.log(2 * math.pi)).sum(1)
    nats = before[:, None] - (prior[:, None] + divergence + dims * math.log(alpha))  # (B, probes)
    spread = nats.std(1) / math.sqrt(nats.shape[1]) if nats.shape[1] > 1 else nats.new_full((rows,), math.nan)
    probe_error = float((spread**2).sum().sqrt()) / rows / (dims * math.log(2)) if probes else 0.0
    between = nats.mean(1).cpu()
    whole = bits(between + decoder.cpu(), dims)
    return FlowLikelihood(whole, probe_error, bits(between, dims) if dequantisation == "noised" else None)


def _dequantised(
    x0: Tensor,
    dequantisation: Dequantisation,
    clean: float,
    marginal: Marginal,
    bins: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The u = x/alpha the ODE starts from, log q(u | x0) and −log p(x0 | u), nats (B,): −log P <= both − log p(u)."""
    if dequantisation not in ("uniform", "noised"):
        raise InputError(f"unknown dequantisation {dequantisation!r}; it can be uniform or noised")
    dims, nothing = x0[0].numel(), x0.new_zeros(len(x0))
    if dequantisation == "uniform":
        if bins is None:
            return x0, nothing, nothing
        noise = torch.rand(x0.shape, generator=generator, dtype=x0.dtype).to(x0) - 0.5
        return x0 + 2 / (bins - 1) * noise, nothing + dims * math.log((bins - 1) / 2), nothing
    alpha, sigma = (float(value) for value in marginal(clean))
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0)
    known = -0.5 * (eps**2 + math.log(2 * math.pi)).flatten(1).sum(1) - dims * math.log(sigma / alpha)
    return x0 + sigma / alpha * eps, known, bayes_decoder_nats(x0, clean, marginal, bins, generator)


def _probes(x0: Tensor, probes: int | None, generator: torch.Generator | None) -> list[Tensor]:
    """Rademacher vectors shaped as x0, or the unit vectors where the trace is to be exact."""
    if probes is None:
        unit = torch.eye(x0[0].numel(), dtype=x0.dtype, device=x0.device)
        return [vector.reshape(1, *x0.shape[1:]).expand_as(x0) for vector in unit]
    if probes < 1:
        raise InputError("the likelihood needs one or more probes, or None for the exact trace")
    return [
        (2 * torch.randint(0, 2, x0.shape, generator=generator) - 1).to(x0.dtype).to(x0.device) for _ in range(probes)
    ]


def _value_and_traces(function: Callable[[Tensor], Tensor], x: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """function(x) and v·(J v) for each vector, (B, vectors); exact traces, unit vectors given, are summed to (B, 1)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        products = [
            (torch.autograd.grad(value, x, vector, retain_graph=i < len(vectors) - 1)[0] * vector).flatten(1).sum(1)
            for i, vector in enumerate(vectors)
        ]
    traces = torch.stack(products, dim=1)
    exact = bool((vectors[0] == 0).any())
    return value.detach(), traces.sum(1, keepdim=True) if exact else traces
