"""Losses: what a network is trained to make small. The one file here, with likelihood.py, that needs torch."""

import math
from collections.abc import Callable
from typing import Literal

import torch

from latentgen.diffusion.array import column
from latentgen.diffusion.denoiser import Condition, Network, halves
from latentgen.diffusion.likelihood import logsnr_and_rate, step_divergence
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule.continuous import Learned
from latentgen.diffusion.schedule.protocol import Schedule
from latentgen.errors import InputError

Tensor = torch.Tensor
Density = Literal["uniform", "logit-normal", "lognormal-sigma"]
Weighting = Callable[[Tensor, Tensor, float], Tensor]  # (logsnr (B,), −dlogsnr/dt (B,), parameter) -> (B,)

# the weight on the squared error of eps, and the parameter's default; `simple` is 1 on whatever is predicted
WEIGHTINGS: dict[str, tuple[Weighting, float]] = {
    # min(SNR, gamma) on x0 (Hang et al. 2023, section 3.4), so min(SNR, gamma)/SNR on eps
    "min-snr": (lambda logsnr, rate, gamma: torch.clamp(gamma * torch.exp(-logsnr), max=1.0), 5.0),
    # 1/(1 + SNR)^gamma (Choi et al. 2022, eq. 8, with k = 1)
    "p2": (lambda logsnr, rate, gamma: torch.sigmoid(-logsnr) ** gamma, 1.0),
    # sigmoid(gamma − logsnr) on the bound's integrand (Kingma & Gao 2023; Hoogeboom et al. 2024 with gamma = −3 … 3)
    "sigmoid": (lambda logsnr, rate, gamma: 0.5 * rate * torch.sigmoid(gamma - logsnr), 0.0),
    # the bound itself, L_infinity (Kingma et al. 2021, eq. 17)
    "bound": (lambda logsnr, rate, gamma: 0.5 * rate, 0.0),
    # (sigma² + sigma_data²)/(sigma·sigma_data)² on x0 (Karras et al. 2022, table 1), gamma being sigma_data
    "edm": (lambda logsnr, rate, gamma: 1 + torch.exp(-logsnr) / gamma**2, 1.0),
}

OF_THE_BOUND = ("sigmoid", "bound")  # those that weigh the bound's integrand, and so need −dlogsnr/dt


def denoising_loss(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    x0: Tensor,
    condition: Condition,
    t: Tensor,
    eps: Tensor,
    *,
    weighting: str = "simple",
    gamma: float | None = None,
    teacher: Network | None = None,
    taught: int = 0,
) -> Tensor:
    """The weighted squared error of the network's output, averaged over all but the batch: (B,).

    x0, eps: (B, …); t: (B,) in [0, 1]. weighting "simple" is L_simple (Ho et al. 2020, eq. 14) for eps, and the
    plain squared error of its own target for the other predictions; the rest are WEIGHTINGS, each with its own
    `gamma`. A network with a learned variance is judged by its first half (see `hybrid_loss` for the second).
    The last `taught` rows are compared with what another network, the teacher, answers there (Li & Hoiem 2016).
    """
    logsnr = schedule.logsnr(t)
    alpha, sigma = (column(value, x0) for value in schedule.marginal(logsnr))
    x, time = alpha * x0 + sigma * eps, schedule.time(logsnr)
    target = prediction.target(x0, eps, alpha, sigma).float()
    if teacher is not None and taught:
        rows = slice(len(x) - taught, None)
        with torch.no_grad():
            answers = halves(teacher(x[rows], time[rows], condition.rows(rows)), x0)[0].float()
        target = torch.cat([target[: len(x) - taught], answers])
    error = halves(network(x, time, condition), x0)[0].float() - target
    loss = error.square().flatten(1).mean(1)
    return loss if weighting == "simple" else loss * output_weight(weighting, schedule, prediction, t, gamma)


def output_weight(
    weighting: str, schedule: Schedule, prediction: Prediction, t: Tensor, gamma: float | None = None
) -> Tensor:
    """The weighting's factor on the squared error of what this network predicts, (B,).

    At a given x, out's error is det/alpha times eps's, so a weight w on eps is w·(alpha/det)² on out.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"unknown weighting {weighting!r}; it can be one of: simple, {', '.join(WEIGHTINGS)}")
    weight, default = WEIGHTINGS[weighting]
    if weighting in OF_THE_BOUND:
        logsnr, rate = logsnr_and_rate(schedule, t)
    else:
        logsnr = rate = schedule.logsnr(t)  # the rate is not asked for, and costs a gradient
    alpha, sigma = schedule.marginal(logsnr)
    on_eps = weight(logsnr, rate, default if gamma is None else gamma)
    return on_eps * (alpha / prediction.determinant(alpha, sigma)) ** 2


def times(
    n: int,
    *,
    density: Density = "uniform",
    generator: torch.Generator | None = None,
    low_discrepancy: bool = True,
    device: torch.device | str | None = None,
    schedule: Schedule | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> Tensor:
    """n training times in (0, 1), float32 (n,).

    low_discrepancy: one uniform draw and its n − 1 equally spaced shifts modulo 1 (Kingma et al. 2021, appendix I.1),
    which spreads a batch evenly over the density; without it they are independent.
    density: "uniform"; "logit-normal", t = sigmoid(mean + std·z) (Esser et al. 2024, eq. 19; 0 and 1);
    "lognormal-sigma", log(sigma/alpha) = mean + std·z on the given `schedule` (Karras et al. 2022, table 1; −1.2 and
    1.2 are for data of standard deviation 0.5, so −0.5 and 1.2 for ours of 1).
    """
    place = generator.device if generator is not None else device
    if low_discrepancy:
        u = (torch.rand(1, generator=generator, device=place) + torch.arange(n, device=place) / n) % 1.0
    else:
        u = torch.rand(n, generator=generator, device=place)
    return at_density(u, density, schedule=schedule, mean=mean, std=std).to(device or u.device)


def at_density(
    u: Tensor,
    density: Density = "uniform",
    *,
    schedule: Schedule | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> Tensor:
    """Uniform numbers u (n,) as times of a density of `times`, by its quantiles: spread evenly, they stay so."""
    u = u.clamp(1e-6, 1 - 1e-6)
    if density == "logit-normal":
        u = torch.sigmoid((mean or 0.0) + (1.0 if std is None else std) * torch.special.ndtri(u)).clamp(1e-6, 1 - 1e-6)
    elif density == "lognormal-sigma":
        if schedule is None:
            raise InputError("the density lognormal-sigma needs the schedule whose times are drawn")
        z = torch.special.ndtri(u)
        u = times_of(schedule, -2 * ((-0.5 if mean is None else mean) + (1.2 if std is None else std) * z))
    elif density != "uniform":
        raise InputError(f"unknown time density {density!r}; it can be uniform, logit-normal or lognormal-sigma")
    return u


def times_of(schedule: Schedule, logsnr: Tensor) -> Tensor:
    """The t in (0, 1) at which a schedule has these logSNRs (n,), by bisection; beyond its ends, its ends."""
    low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
    for _ in range(30):
        middle = 0.5 * (low + high)
        above = schedule.logsnr(middle) > logsnr
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (0.5 * (low + high)).clamp(1e-6, 1 - 1e-6)


def offset_noise(eps: Tensor, strength: float = 0.1, *, generator: torch.Generator | None = None) -> Tensor:
    """eps (B, C, …) with one extra normal number for each channel of each picture (Guttenberg 2023).

    It teaches the network to move the mean of a picture, which plain noise hardly disturbs.
    """
    shape = (*eps.shape[:2], *(1,) * (eps.ndim - 2))
    place = generator.device if generator is not None else eps.device
    return eps + strength * torch.randn(shape, generator=generator, device=place).to(eps)


def sigma_ladder(sigma_min: float, sigma_max: float, levels: int) -> Tensor:
    """The geometric ladder of NCSN, falling from sigma_max to sigma_min: (levels,) (Song & Ermon 2019, section 4.1)."""
    return torch.exp(torch.linspace(math.log(sigma_max), math.log(sigma_min), levels))


def score_matching_loss(
    score: Network, x0: Tensor, condition: Condition, ladder: Tensor, rung: Tensor, eps: Tensor
) -> Tensor:
    """Denoising score matching on a sigma ladder, weighted by sigma² (Song & Ermon 2019, eq. 5 and 6): (B,).

    score: (x, sigma (B,), condition) -> the score of x's density, (B, …). ladder: (levels,); rung: (B,) whole numbers
    into it. The sum over a picture, not the mean, as the paper has it.
    """
    sigma = ladder.to(x0)[rung]
    spread = column(sigma, x0)
    error = spread * score(x0 + spread * eps, sigma, condition) + eps
    return 0.5 * error.square().flatten(1).sum(1)


def hybrid_loss(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    x0: Tensor,
    condition: Condition,
    logsnr: Tensor,
    next_logsnr: Tensor,
    eps: Tensor,
    *,
    weight: float = 0.001,
) -> Tensor:
    """L_simple + weight·L_t for a network with a learned variance (Nichol & Dhariwal 2021, after eq. 16).

    logsnr, next_logsnr: (B,), the two ends of one reverse step of the ladder that is to be sampled with. L_t, the
    bound's term of that step in nats a dimension, trains the variance alone: the mean in it is detached, as the paper
    does. Over t drawn evenly it is the mean of L_0 … L_T, where the paper's L_vlb is their sum: with T steps, its
    lambda of 0.001 is a weight of 0.001·T here. (B,).
    """
    alpha, sigma = (column(value, x0) for value in schedule.marginal(logsnr))
    x = alpha * x0 + sigma * eps
    out, v = halves(network(x, schedule.time(logsnr), condition), x0)
    if v is None:
        raise InputError("the hybrid loss needs a network with twice as many channels out as in")
    simple = (out - prediction.target(x0, eps, alpha, sigma)).square().flatten(1).mean(1)
    estimate = prediction.split(out.detach(), x, alpha, sigma)[0]
    nats = step_divergence(x0, estimate, x, logsnr, next_logsnr, schedule.marginal, variance="learned-range", v=v)
    return simple + weight * nats / x0[0].numel()


def learned_schedule(
    hidden: int = 1024, *, logsnr_min: float = -10.0, logsnr_max: float = 10.0, seed: int = 0
) -> tuple[Learned, list[Tensor]]:
    """A learned monotone schedule and its weights, which an optimiser takes (Kingma et al. 2021, appendix H).

    It starts out nearly linear in t. Its interior changes the variance of the bound's estimate, not the bound.
    """
    generator = torch.Generator().manual_seed(seed)
    inner, shift, outer = (torch.randn(hidden, generator=generator) for _ in range(3))
    weights = [torch.full((1,), float(logsnr_max - logsnr_min)), torch.zeros(1), inner, shift, outer / hidden]
    weights = [weight.requires_grad_() for weight in weights]
    w1, b1, w2, b2, w3 = weights
    return Learned(w1, b1, w2, b2, w3, logsnr_min, logsnr_max), weights


def variational_loss(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    x0: Tensor,
    condition: Condition,
    t: Tensor,
    eps: Tensor,
) -> Tensor:
    """The bound's diffusion term at t, −dlogsnr/dt·|eps − eps_hat|²/2, in nats a dimension: (B,).

    Kingma et al. 2021, eq. 17. A learned schedule's interior does not change the bound, so it is taught what it does
    change: its gradient is that of the square of each row's term, which makes the estimate's variance small (appendix
    I.2, in the one backward pass); the network's gradient is the bound's own.
    """
    logsnr, rate = logsnr_and_rate(schedule, t)
    terms: list[Tensor] = []
    for level in (logsnr, rate):
        if level.requires_grad:
            level.register_hook(lambda gradient: 2 * terms[0] * gradient)  # type: ignore[no-untyped-call]
    alpha, sigma = (column(value, x0) for value in schedule.marginal(logsnr))
    out = network(alpha * x0 + sigma * eps, schedule.time(logsnr), condition)
    error = halves(out, x0)[0] - prediction.target(x0, eps, alpha, sigma)
    on_eps = (alpha / prediction.determinant(alpha, sigma)) * error
    loss = 0.5 * rate * on_eps.square().flatten(1).mean(1)
    terms.append(loss.detach())
    return loss
