"""Samplers that walk along the score: annealed Langevin dynamics, and predictor–corrector.

Both live in the VE frame, u = x/alpha and s = sigma/alpha, where the score of a noised x is

    grad log p(u) = (x0 − u)/s²        (Tweedie's formula; Song & Ermon 2019, section 3)

and x is brought back to its own frame after each level.
"""

import math
from collections.abc import Iterator

import numpy as np

from latentgen.diffusion.array import Array, namespace
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling.walk import Denoise, Marginal, Step, legs
from latentgen.errors import InputError


def annealed_langevin(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    step: float = 0.2,
    repeats: int = 5,
) -> Iterator[Step]:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1): `repeats` Langevin steps at each level.

    u += (a/2)·score + sqrt(a)·z with a = step·s²; the paper's epsilon is step·s_L² (2e-5 at s_L = 0.01 is 0.2), and
    its T = 100 is `repeats`. A walk to clean ends on x0, the denoising step of Jolicoeur-Martineau et al. 2021.
    Evaluations: repeats a level.
    """
    if repeats < 1 or not step > 0:
        raise InputError("annealed Langevin needs 1 or more repeats and a step above 0")
    for leg in legs(knots, marginal):
        for repeat in range(repeats):
            x0 = denoise(x, leg.logsnr)
            fresh = _fresh(noise, leg.index * repeats + repeat, x)
            x = x + 0.5 * step * (leg.alpha * x0 - x) + (math.sqrt(step) * leg.sigma) * fresh
        if leg.to_clean:
            x = x0 = denoise(x, leg.logsnr)
        else:
            x = (leg.next_alpha / leg.alpha) * x
        yield Step(leg.index, x, x0, leg.next_logsnr)


def predictor_corrector(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    snr: float = 0.16,
    corrections: int = 1,
) -> Iterator[Step]:
    """Reverse-diffusion predictor, Langevin corrector (Song et al. 2021, algorithms 2 and 4).

    At each level: `corrections` Langevin steps of the signal-to-noise ratio `snr`, then the predictor
    u' = u + (s² − s'²)·score + sqrt(s² − s'²)·z, without z on the last. A leap out of pure noise takes s'/s of that z,
    the ancestral predictor (ibid., appendix F), or it would stay as noisy as it was. Step sizes are each row's own (the
    paper averages norms over the batch). Evaluations: corrections + 1 a level.
    """
    if corrections < 0 or not snr > 0:
        raise InputError("predictor-corrector needs 0 or more corrections and an snr above 0")
    draws = corrections + 1
    for leg in legs(knots, marginal):
        u, s, s_next = x / leg.alpha, leg.sigma / leg.alpha, leg.next_sigma / leg.next_alpha
        for correction in range(corrections):
            score = (denoise(leg.alpha * u, leg.logsnr) - u) / s  # s times the score: of order 1
            fresh = _fresh(noise, leg.index * draws + correction, x)
            size = _bounded(2 * (snr * _norm(fresh)) ** 2, _norm(score) ** 2)  # algorithm 4's epsilon, over s²
            u = u + s * (size * score + (2 * size) ** 0.5 * fresh)
        x0 = denoise(leg.alpha * u, leg.logsnr)
        u = x0 + (s_next / s) ** 2 * (u - x0)
        if not leg.last:
            spread = math.sqrt(s**2 - s_next**2) * (s_next / s if leg.leaps else 1.0)
            u = u + spread * _fresh(noise, leg.index * draws + corrections, x)
        x = leg.next_alpha * u
        yield Step(leg.index, x, x0, leg.next_logsnr)


def _fresh(noise: Noise | None, index: int, like: Array) -> Array:
    if noise is None:
        raise InputError("this sampler draws noise at every step: give it seeds")
    return noise.step(index, like)


def _bounded(above: Array, below: Array) -> Array:
    """above/below, at most 1: a Langevin step longer than s² leaves the density it should stay in."""
    xp = namespace(above)
    return xp.where(above < below, above, below) / xp.where(below > 0, below, xp.ones_like(below))


def _norm(x: Array) -> Array:
    """Each row's Euclidean norm, (B, 1, …, 1)."""
    xp = namespace(x)
    squares = xp.sum(xp.reshape(x * x, (x.shape[0], -1)), axis=1)
    return xp.reshape(xp.sqrt(squares), (-1,) + (1,) * (x.ndim - 1))
