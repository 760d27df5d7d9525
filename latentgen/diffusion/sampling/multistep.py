"""Linear multistep solvers of the probability-flow ODE: one evaluation a step and a memory of earlier ones.

LMS and DEIS are the same Adams–Bashforth method for du/drho = eps (u = x/alpha, rho = sigma/alpha), with eps
interpolated as a polynomial in rho or in log rho. PLMS takes the classic coefficients for equal steps. UniPC adds a
corrector that reuses the next evaluation.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

import numpy as np

from latentgen.diffusion.array import Array, increase
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling.ancestral import move
from latentgen.diffusion.sampling.walk import Denoise, Leg, Marginal, Step, legs
from latentgen.errors import InputError

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
Of = Literal["eps", "v"]  # which of a network's outputs a method extrapolates


@cache
def quadrature() -> list[tuple[float, float]]:
    """Gauss and Legendre's places in (−1, 1) and weights: exact for LMS, to rounding for DEIS."""
    return list(zip(*(ends.tolist() for ends in np.polynomial.legendre.leggauss(16)), strict=True))


def lms(
    denoise: Denoise, x: Array, knots: np.ndarray, marginal: Marginal, noise: Noise | None = None, *, order: int = 4
) -> Iterator[Step]:
    """Linear multistep in sigma/alpha (k-diffusion's LMS; Adams–Bashforth for unequal steps), of the order given."""
    return _adams(denoise, x, knots, marginal, order, in_log=False)


def deis(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DEIS, the log-rho Adams–Bashforth variant (Zhang & Chen 2023, eq. 15 and section 3.3), of the order given."""
    return _adams(denoise, x, knots, marginal, order, in_log=True, lower_order_final=lower_order_final)


def _adams(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    order: int,
    *,
    in_log: bool,
    lower_order_final: bool = False,
) -> Iterator[Step]:
    if order < 1:
        raise InputError(f"a multistep order of {order} makes no sense; it must be 1 or more")
    few = lower_order_final and len(knots) - 1 < 15
    past: list[tuple[float, Array]] = []  # (log rho, eps), newest first
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        past = [(-0.5 * leg.logsnr, output_of(x, x0, leg.alpha, leg.sigma, "eps")), *past[: order - 1]]
        left = len(knots) - 1 - leg.index
        usable = min(len(past), left) if few else len(past)
        if in_log and leg.to_clean:
            usable = 1  # log rho has no end there
        _, *bends = adams_weights([level for level, _ in past[:usable]], -0.5 * leg.next_logsnr, in_log)
        # all weights sum up to s' − s: Euler's step and what bends it, which holds where s has no bound
        x = increase(move(x, x0, leg, leg.next_sigma), -leg.next_alpha * sum(bends), past[0][1])
        for weight, (_, eps) in zip(bends, past[1:], strict=False):
            x = increase(x, leg.next_alpha * weight, eps)  # x is this loop's own
        yield Step(leg.index, x, x0, leg.next_logsnr)


def adams_weights(levels: list[float], end: float, in_log: bool) -> list[float]:
    """∫ L_i drho from levels[0] to end, for each Lagrange polynomial L_i through `levels` (all are log rho)."""
    if len(levels) == 1:
        return [math.exp(end) - math.exp(levels[0])]
    nodes = levels if in_log else [math.exp(level) for level in levels]
    stop = end if in_log else math.exp(end)
    half, middle = 0.5 * (stop - nodes[0]), 0.5 * (stop + nodes[0])
    weights = [0.0] * len(nodes)
    for place, share in quadrature():  # Python's own floats: the lists are too short for NumPy to pay
        point = half * place + middle
        measure = half * share * (math.exp(point) if in_log else 1.0)
        for i, node in enumerate(nodes):
            value = measure
            for j, other in enumerate(nodes):
                if j != i:
                    value *= (point - other) / (node - other)
            weights[i] += value
    return weights


def carry(leg: Leg, of: Of) -> tuple[float, float]:
    """(kept, share) of PNDM's phi, x' = kept·x + share·out (Liu et al. 2022, eq. 11): DDIM's step along one output.

    For eps, (alpha'/alpha, sigma' − sigma·alpha'/alpha); for v, with x0 and eps solved for (Salimans & Ho 2022,
    appendix D), (alpha·alpha' + sigma·sigma', alpha·sigma' − sigma·alpha') over alpha² + sigma².
    """
    alpha, sigma, to_alpha, to_sigma = leg.alpha, leg.sigma, leg.next_alpha, leg.next_sigma
    if of == "eps":
        return to_alpha / alpha, to_sigma - sigma * to_alpha / alpha
    size = alpha**2 + sigma**2
    return (alpha * to_alpha + sigma * to_sigma) / size, (alpha * to_sigma - sigma * to_alpha) / size


def output_of(x: Array, x0: Array, alpha: float, sigma: float, of: Of) -> Array:
    """eps = (x − alpha·x0)/sigma, or v = alpha·eps − sigma·x0."""
    if of == "eps":
        share, other = 1 / sigma, alpha / sigma
    else:
        share, other = alpha / sigma, (alpha**2 + sigma**2) / sigma
    return increase(share * x, -other, x0)


def transfer(x: Array, out: Array, leg: Leg, of: Of) -> Array:
    """x carried along one output to the next knot."""
    kept, share = carry(leg, of)
    return increase(kept * x, share, out)


def plms(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    of: Of = "eps",
) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, algorithm 2, as latent diffusion runs it).

    The first of several steps is a pseudo improved Euler step of two evaluations; then one a step, order up to 4.
    of: what is extrapolated, the paper's eps or, as diffusers does for networks that predict it, v. Out of pure noise,
    where an error of eps has no bound in x0, steps along eps are DDIM's.
    """
    past: list[Array] = []
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        past = [output_of(x, x0, leg.alpha, leg.sigma, of), *past[:3]]
        if of == "eps" and leg.drowned:
            x = move(x, x0, leg, leg.next_sigma)
        elif leg.first and not leg.last and not leg.to_clean:
            guess = transfer(x, past[0], leg, of)
            end = output_of(guess, denoise(guess, leg.next_logsnr), leg.next_alpha, leg.next_sigma, of)
            x = transfer(x, 0.5 * (past[0] + end), leg, of)
        else:
            x = combined(x, past, leg, of)
        yield Step(leg.index, x, x0, leg.next_logsnr)


def halfway(logsnr: float, next_logsnr: float) -> float:
    """The level between two knots at which pndm's Runge–Kutta steps evaluate, unless it is told another."""
    return 0.5 * (logsnr + next_logsnr)


def pndm(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    midpoint: Callable[[float, float], float] = halfway,
    of: Of = "eps",
) -> Iterator[Step]:
    """Pseudo numerical methods (Liu et al. 2022, algorithm 1): three pseudo Runge–Kutta steps, then PLMS.

    The first three steps cost four evaluations each. `midpoint` gives the level between two knots. of: as in `plms`,
    and out of pure noise likewise.
    """
    past: list[Array] = []

    def output_at(y: Array, logsnr: float) -> Array:
        alpha, sigma = (float(value) for value in marginal(logsnr))
        return output_of(y, denoise(y, logsnr), alpha, sigma, of)

    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        first = output_of(x, x0, leg.alpha, leg.sigma, of)
        past = [first, *past[:3]]
        if of == "eps" and leg.drowned:
            x = move(x, x0, leg, leg.next_sigma)
        elif leg.index < 3 and not leg.to_clean:
            middle = midpoint(leg.logsnr, leg.next_logsnr)
            alpha, sigma = marginal(middle)
            half = leg._replace(next_logsnr=middle, next_alpha=float(alpha), next_sigma=float(sigma))
            second = output_at(transfer(x, first, half, of), middle)
            third = output_at(transfer(x, second, half, of), middle)
            fourth = output_at(transfer(x, third, leg, of), leg.next_logsnr)
            x = transfer(x, (first + 2 * second + 2 * third + fourth) / 6, leg, of)
        else:
            x = combined(x, past, leg, of)
        yield Step(leg.index, x, x0, leg.next_logsnr)


def combined(x: Array, past: list[Array], leg: Leg, of: Of) -> Array:
    """`transfer` along the Adams–Bashforth combination of the outputs of equal steps, newest first."""
    kept, share = carry(leg, of)
    x = kept * x
    for weight, out in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True):
        x = increase(x, share * weight, out)  # x is this function's own
    return x


def unipc(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    order: int = 2,
    solver: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
    corrector: bool = True,
) -> Iterator[Step]:
    """UniPC with data prediction (Zhao et al. 2023, algorithms 5 to 8 of the multistep form); order 1 to 4.

    Each x is corrected, by the evaluation made at it, before the next step is predicted: no evaluation is spent.
    """
    if not 1 <= order <= 4 or solver not in ("bh1", "bh2"):
        raise InputError("unipc takes an order from 1 to 4 and the solver bh1 or bh2")
    past: list[tuple[float, Array]] = []  # (lambda, x0), newest first
    before: tuple[Array, Leg, list[tuple[float, Array]]] | None = None  # what the last prediction was made from
    for leg in legs(knots, marginal):
        x0 = denoise(x, leg.logsnr)
        if before is not None and corrector:
            x = _unified_step(*before, solver, x0)
        past = [(0.5 * leg.logsnr, x0), *past[: order - 1]]
        left = len(knots) - 1 - leg.index
        usable = 1 if leg.simple else min(len(past), left) if lower_order_final else len(past)
        before = (x, leg, past[:usable])
        x = _unified_step(*before, solver, None)
        yield Step(leg.index, x, x0, leg.next_logsnr)


def _unified_step(x: Array, leg: Leg, past: list[tuple[float, Array]], solver: str, ahead: Array | None) -> Array:
    """UniP (ahead None) or UniC (ahead is x0 at the step's end): Zhao et al. 2023, eq. 3 with B(h) and eq. 8."""
    order = len(past)
    (level, x0), earlier = past[0], past[1:]
    ratios = [(other - level) / leg.h for other, _ in earlier]  # r_k, negative
    scale = math.expm1(-leg.h) if solver == "bh2" else -leg.h
    weights = _unified_weights(ratios, -leg.h, scale, order, corrected=ahead is not None)
    # the differences D_k = (value − x0)/r_k, and ahead − x0 with r = 1, each times its weight
    others = [*earlier, *([] if ahead is None else [(level + leg.h, ahead)])]
    shares = [leg.next_alpha * scale * weight / ratio for weight, ratio in zip(weights, [*ratios, 1.0], strict=False)]
    x = increase((leg.next_sigma / leg.sigma) * x, sum(shares) - leg.next_alpha * math.expm1(-leg.h), x0)
    for share, (_, value) in zip(shares, others, strict=True):
        x = increase(x, -share, value)
    return x


def _unified_weights(ratios: list[float], h: float, scale: float, order: int, *, corrected: bool) -> list[float]:
    """The solution of R(r) a = b (Zhao et al. 2023, theorem 3.1); orders 1 and 2 have the paper's simple 1/2."""
    if order == (1 if corrected else 2):
        return [0.5]
    count = order if corrected else order - 1
    if count == 0:
        return []
    points = [*ratios, 1.0][:count]
    phi, factorial, b = math.expm1(h) / h - 1, 1.0, []
    for i in range(1, count + 1):
        b.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / h - 1 / factorial
    if count == 2:
        second = (b[1] - points[0] * b[0]) / (points[1] - points[0])
        return [b[0] - second, second]
    matrix = np.vander(np.array(points), count, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(matrix, np.array(b))]
