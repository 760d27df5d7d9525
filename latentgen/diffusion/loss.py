"""Losses: what a network is trained to make small. The one file here, with likelihood.py, that needs torch."""

from collections.abc import Callable
from typing import Literal

import torch

from latentgen.diffusion.array import column
from latentgen.diffusion.denoiser import Condition, Network
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule.protocol import Schedule
from latentgen.errors import InputError

Tensor = torch.Tensor
Density = Literal["uniform"]

# weight on the eps error, (logsnr, gamma) -> w; `simple` is 1 on whatever the network predicts
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # Hang et al. 2023, section 3.4: min(SNR, gamma) on x0, so min(SNR, gamma)/SNR on eps
    "min-snr": lambda logsnr, gamma: torch.clamp(gamma * torch.exp(-logsnr), max=1.0),
}


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
    gamma: float = 5.0,
) -> Tensor:
    """The weighted squared error of the network's output, averaged over all but the batch: (B,).

    x0, eps: (B, …); t: (B,) in [0, 1]. weighting "simple" is L_simple (Ho et al. 2020, eq. 14) for eps, and the
    plain squared error of its own target for the other predictions; "min-snr" is Hang et al. 2023 with `gamma`.
    """
    logsnr = schedule.logsnr(t)
    alpha, sigma = (column(value, x0) for value in schedule.marginal(logsnr))
    out = network(alpha * x0 + sigma * eps, schedule.time(logsnr), condition)
    error = out.float() - prediction.target(x0, eps, alpha, sigma).float()
    loss = error.square().flatten(1).mean(1)
    return loss if weighting == "simple" else loss * output_weight(weighting, schedule, prediction, logsnr, gamma)


def output_weight(weighting: str, schedule: Schedule, prediction: Prediction, logsnr: Tensor, gamma: float) -> Tensor:
    """The weighting's factor on the squared error of what this network predicts, (B,).

    At a given x, out's error is (det/alpha) times eps's, so a weight w on eps is w·(alpha/det)² on out.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"unknown weighting {weighting!r}; it can be one of: simple, {', '.join(WEIGHTINGS)}")
    alpha, sigma = schedule.marginal(logsnr)
    return WEIGHTINGS[weighting](logsnr, gamma) * (alpha / prediction.determinant(alpha, sigma)) ** 2


def times(
    n: int,
    *,
    density: Density = "uniform",
    generator: torch.Generator | None = None,
    low_discrepancy: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """n training times in (0, 1), float32 (n,).

    low_discrepancy: one uniform draw and its n − 1 equally spaced shifts modulo 1 (Kingma et al. 2021, appendix I.1),
    which spreads a batch evenly over the schedule; without it they are independent.
    """
    if density != "uniform":
        raise InputError(f"unknown time density {density!r}; it can be: uniform")
    place = generator.device if generator is not None else device
    if low_discrepancy:
        u = (torch.rand(1, generator=generator, device=place) + torch.arange(n, device=place) / n) % 1.0
    else:
        u = torch.rand(n, generator=generator, device=place)
    return u.clamp(1e-6, 1 - 1e-6).to(device or u.device)
