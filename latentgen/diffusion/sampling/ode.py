"""Solvers of the probability-flow ODE with more than one evaluation, or memory of earlier ones: Heun, DPM-Solver++.

The DPM-Solver++ forms take the reverse SDE too (eta > 0): it is the same exponential step with noise.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from latentgen.diffusion.array import Array, increase
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling.ancestral import drawn, move
from latentgen.diffusion.sampling.walk import Denoise, Leg, Marginal, Step, legs
from latentgen.diffusion.schedule.protocol import LOGSNR_MAX
from latentgen.errors import InputError

Solver = Literal["midpoint", "heun"]


def heun(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    always: bool = False,
) -> Iterator[Step]:
    """Heun's second-order method in sigma/alpha (Karras et al. 2022, algorithm 1); the step to clean is Euler's.

    In u = x/alpha and s = sigma/alpha the ODE is du/ds = (u − x0)/s, and the corrected step averages both ends'
    slopes. Two evaluations a step, one for the last. A leap out of pure noise is Euler's too: the correction is the
    difference of two x0 times (s/s' − 1)/2, there hundreds of times what is known. always: corrected, as in diffusers.
    """
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        guess = move(x, x0, leg, leg.next_sigma)
        if leg.to_clean or (leg.leaps and not always):
            x = guess
        else:
            end = denoise(guess, leg.next_logsnr)
            x = _heun_corrected(x, x0, end, leg)
        yield Step(leg.index, x, x0, leg.next_logsnr)


def _heun_corrected(x: Array, x0: Array, end: Array, leg: Leg) -> Array:
    """u' = u + (s' − s)·((u − x0)/s + (u_guess − end)/s')/2 with u_guess = x0 + (s'/s)·(u − x0): (u − x0)/s twice.

    Together u' = u + (s' − s)·((u − x0)/s + (x0 − end)/(2s')).
    """
    s, s_next = leg.sigma / leg.alpha, leg.next_sigma / leg.next_alpha
    slope, bend = (s_next - s) / s, (s_next - s) / (2 * s_next)
    x = (leg.next_alpha / leg.alpha * (1 + slope)) * x
    x = increase(x, leg.next_alpha * (bend - slope), x0)
    x = increase(x, -leg.next_alpha * bend, end)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    order: int = 2,
    solver: Solver = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2), of order 1, 2 or 3; one evaluation a step.

    eta: 0 is the ODE, 1 the reverse SDE (SDE-DPM-Solver++, ibid., section 5; the noise then follows a Brownian path).

    Order 3 has the authors' own coefficients and measures as order 2; unipc and deis reach 3.
    lower_order_final: the last step is of first order in runs of fewer than 15 steps, as the authors advise;
    euler_at_final: in all runs. A step to clean is always of first order, where the higher orders are not defined.
    """
    if order not in (1, 2, 3) or solver not in ("midpoint", "heun"):
        raise InputError("dpmpp-2m takes an order of 1, 2 or 3 and the solver midpoint or heun")
    few = lower_order_final and len(knots) - 1 < 15
    past: list[tuple[float, Array]] = []  # (lambda, x0) of the steps before, newest first
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        past = [(0.5 * leg.logsnr, x0), *past[: order - 1]]
        usable = 1 if leg.simple or (leg.last and (few or euler_at_final)) else len(past)
        usable = min(usable, 2) if few and leg.index == len(knots) - 3 else usable
        x = exponential_step(x, past[:usable], leg, solver, eta)
        if eta and not leg.simple:
            x = increase(x, leg.next_sigma * math.sqrt(-math.expm1(-2 * eta * leg.h)), drawn(noise, leg, x))
        yield Step(leg.index, x, x0, leg.next_logsnr)


def differences(levels: Sequence[float], h: float) -> list[tuple[float, ...]]:
    """Divided differences of x0 in lambda, scaled by h, as weights of the x0s at `levels` (lambda, newest first).

    [] for one level, [D1] for two, [D1, D2] for three. Lu et al. 2022, appendix: r0 = (lambda_0 − lambda_1)/h,
    D1_0 = (m0 − m1)/r0, and so on.
    """
    if len(levels) == 1:
        return []
    r0 = (levels[0] - levels[1]) / h
    if len(levels) == 2:
        return [(1 / r0, -1 / r0)]
    r1 = (levels[1] - levels[2]) / h
    bend = (1 / r0, -1 / r0 - 1 / r1, 1 / r1)  # D1_0 − D1_1
    share = r0 / (r0 + r1)
    return [
        (1 / r0 + share * bend[0], -1 / r0 + share * bend[1], share * bend[2]),
        tuple(weight / (r0 + r1) for weight in bend),
    ]


def exponential_step(
    x: Array, past: Sequence[tuple[float, Array]], leg: Leg, solver: Solver = "midpoint", eta: float = 0.0
) -> Array:
    """The noise-free part of an exponential step, H = (1 + eta)·h (Lu et al. 2022b, eq. 9 and after).

    x_t = (sigma_t/sigma_s)·e^(−eta·h)·x + alpha_t·(1 − e^−H)·x0 + the terms of x0's slopes in lambda, all of it one
    combination of x and of the x0s. past: (lambda, x0), newest first.
    """
    h = (1 + eta) * leg.h
    drop = math.expm1(-h)  # e^−H − 1
    slopes = differences([level for level, _ in past], leg.h)
    weights = [-drop, *[0.0] * (len(past) - 1)]
    if slopes:
        first = -0.5 * drop if len(slopes) == 1 and solver == "midpoint" else drop / h + 1
        for share, slope in zip((first, 0.5 - (drop + h) / h**2), slopes, strict=False):
            weights = [weight + share * part for weight, part in zip(weights, slope, strict=True)]
    x = (leg.next_sigma / leg.sigma * math.exp(-eta * leg.h)) * x
    for weight, (_, x0) in zip(weights, past, strict=True):
        x = increase(x, leg.next_alpha * weight, x0)  # x is this function's own
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    eta: float = 1.0,
    **options: Any,
) -> Iterator[Step]:
    """SDE-DPM-Solver++ (2M) (Lu et al. 2022b, section 5): dpmpp_2m with eta 1 and noise from one Brownian path."""
    return dpmpp_2m(denoise, x, knots, marginal, path(noise, knots), eta=eta, **options)


def dpmpp_sde(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    eta: float = 1.0,
    r: float = 0.5,
) -> Iterator[Step]:
    """DPM-Solver++ (SDE), singlestep of second order (k-diffusion; Lu et al. 2022a's midpoint with ancestral noise).

    An ancestral step goes to the level a share r of the way in lambda; the x0 found there, extrapolated, drives the
    whole step. Two evaluations a step, one for the last; the noise follows one Brownian path.
    """
    noise = path(noise, knots, r)
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        if not leg.to_clean:
            middle = between(leg.logsnr, leg.next_logsnr, r)
            alpha, sigma = marginal(middle)
            half = leg._replace(next_logsnr=middle, next_alpha=float(alpha), next_sigma=float(sigma))
            share, inside = 1 / (2 * r), denoise(_ancestral(x, x0, half, noise, eta), middle)
            x0 = inside if share == 1 else (1 - share) * x0 + share * inside
        x = _ancestral(x, x0, leg, noise, eta)
        yield Step(leg.index, x, x0, leg.next_logsnr)


def _ancestral(x: Array, x0: Array, leg: Leg, noise: Noise | None, eta: float) -> Array:
    """DDIM's step with eta."""
    std = eta * leg.next_sigma * math.sqrt(leg.ratio)
    moved = move(x, x0, leg, math.sqrt(max(leg.next_sigma**2 - std**2, 0.0)))
    if std > 0 and not leg.simple:
        moved = increase(moved, std, drawn(noise, leg, x))  # its own array
    return moved


def between(logsnr: float, next_logsnr: float, r: float) -> float:
    """The level a share r of the way in lambda."""
    return logsnr + r * (next_logsnr - logsnr)


def path(noise: Noise | None, knots: np.ndarray, r: float | None = None) -> Noise | None:
    """The Brownian path of the same seeds, told where the walk will ask for it: at its knots but a clean end, and in
    each step a share r of the way."""
    if noise is None:
        return None
    levels = [float(level) for level in knots if level < LOGSNR_MAX]
    if r is not None:
        levels += [between(now, after, r) for now, after in pairwise(levels)]
    return noise.brownian(levels)
