"""Samplers of one evaluation a step that draw x_s given x_t and x0: DDPM, DDIM, Euler, Euler ancestral.

They are one formula. With x = alpha·x0 + sigma·eps and std the noise that is new,

    x_s = alpha_s·x0 + sqrt(sigma_s² − std²)·eps + std·z        (Song, Meng & Ermon 2021, eq. 12)

in every frame. LCM draws all of the noise anew; DDIM's inversion walks back. Euler's step for dx/dsigma in the VE
frame (Karras et al. 2022, algorithm 1) is its std = 0.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from latentgen.diffusion.array import Array, exp, increase
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling.walk import Denoise, Leg, Marginal, Step, legs
from latentgen.errors import InputError

Variance = Literal["fixed-small", "fixed-large", "learned-range"]


def move(x: Array, x0: Array, leg: Leg, kept: float) -> Array:
    """alpha_s·x0 + kept·eps with eps = (x − alpha·x0)/sigma, as one combination of x and x0."""
    share = kept / leg.sigma
    return increase(share * x, leg.next_alpha - share * leg.alpha, x0)


def ddim(
    denoise: Denoise, x: Array, knots: np.ndarray, marginal: Marginal, noise: Noise | None = None, *, eta: float = 0.0
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021, eq. 12 and 16); eta 0 is the ODE, 1 is DDPM."""
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        std = eta * leg.next_sigma * math.sqrt(leg.ratio)  # eq. 16, in terms of SNR
        x = move(x, x0, leg, math.sqrt(max(leg.next_sigma**2 - std**2, 0.0)))
        if std > 0 and not leg.simple:
            x = increase(x, std, drawn(noise, leg, x))  # x is this loop's own
        yield Step(leg.index, x, x0, leg.next_logsnr)


def ddpm(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    variance: Variance = "fixed-small",
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), any knots.

    variance "fixed-small" is the posterior's own, beta-tilde (eq. 7); "fixed-large" is beta_t; "learned-range" lies
    between the two, where the network says (Nichol & Dhariwal 2021, eq. 15): then `denoise` must return the pair
    (x0, v) with v in [−1, 1] (see `guided(…, variance=True)`). No noise comes last.
    """
    if variance not in ("fixed-small", "fixed-large", "learned-range"):
        raise InputError(f"unknown variance {variance!r}; it can be fixed-small, fixed-large or learned-range")
    for leg in legs(knots, marginal):
        estimate = denoise(x, leg.logsnr)
        x0, v = estimate if variance == "learned-range" else (estimate, None)
        small, large = leg.next_sigma * math.sqrt(leg.ratio), leg.sigma * math.sqrt(leg.ratio)
        std = large if variance == "fixed-large" else small
        if v is not None and not leg.simple:
            std = small * exp(0.5 * (v + 1) * math.log(large / small))
        x = move(x, x0, leg, math.sqrt(max(leg.next_sigma**2 - small**2, 0.0)))  # the posterior mean, eq. 7
        if not leg.simple:
            x = increase(x, std, drawn(noise, leg, x))
        yield Step(leg.index, x, x0, leg.next_logsnr)


def euler(
    denoise: Denoise, x: Array, knots: np.ndarray, marginal: Marginal, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE in sigma/alpha (Karras et al. 2022, algorithm 1, without churn).

    In any frame this is DDIM with eta 0; what differs in practice is where the knots lie.
    """
    return ddim(denoise, x, knots, marginal, noise, eta=0.0)


def euler_ancestral(
    denoise: Denoise, x: Array, knots: np.ndarray, marginal: Marginal, noise: Noise | None = None, *, eta: float = 1.0
) -> Iterator[Step]:
    """An Euler step down to sigma_down, then noise up to the next sigma (k-diffusion): DDIM with eta 1."""
    return ddim(denoise, x, knots, marginal, noise, eta=eta)


def lcm(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    boundary: Callable[[float], tuple[float, float]] = lambda logsnr: (0.0, 1.0),
) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): to x0 in one step, then fresh noise.

    boundary: logsnr -> (c_skip, c_out), the consistency model's skip connection.
    """
    for leg in legs(knots, marginal):
        c_skip, c_out = boundary(leg.logsnr)
        x0 = c_out * denoise(x, leg.logsnr) + c_skip * x
        x = x0 if leg.last else leg.next_alpha * x0 + leg.next_sigma * drawn(noise, leg, x0)
        yield Step(leg.index, x, x0, leg.next_logsnr)


def ddim_inversion(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    iterations: int = 1,
) -> Iterator[Step]:
    """DDIM backwards, from a clean x to the noise that gives it; `knots` are the sampler's own, walked in reverse.

    The step back solves x' = step(x, eps(x')) for the noisier x' by fixed-point iteration; one iteration takes eps at
    x itself (Dhariwal & Nichol 2021, appendix F; what diffusers' inverse scheduler does), more make the round trip
    exact (Pan et al. 2023, AIDI).
    """
    if iterations < 1:
        raise InputError(f"inversion takes 1 or more iterations, not {iterations}")
    for back in reversed(list(legs(knots, marginal))):
        guess = x
        for _ in range(iterations):
            x0 = denoise(guess, back.logsnr)
            eps = (guess - back.alpha * x0) / back.sigma
            guess = (back.alpha / back.next_alpha) * (x - back.next_sigma * eps) + back.sigma * eps
        x = guess
        yield Step(len(knots) - 2 - back.index, x, x0, back.logsnr)


def drawn(noise: Noise | None, leg: Leg, like: Array) -> Array:
    """The step's noise. Raises InputError where a stochastic sampler was given no noise to draw from."""
    if noise is None:
        raise InputError("this sampler draws noise at every step: give it seeds")
    return noise.step(leg.index, like, span=(leg.logsnr, leg.next_logsnr))
