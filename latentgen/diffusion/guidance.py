"""Guidance: estimates combined into one Denoise.

All of it is one formula, x0 = c + sum over references r of w·(c − r): c is the conditional estimate, r is an estimate
that is worse in a known way. Classifier-free guidance (Ho & Salimans 2022) takes away the condition, or puts a
negative one; autoguidance (Karras et al. 2024) takes a weaker snapshot; perturbed-attention guidance (Ahn et al.
2024) takes the same network with its attention perturbed. A scale of 1 (a weight of 0) is off and costs nothing: one
evaluation of B. Classifier-free guidance is one evaluation of 2B, the unconditional half first; each other reference
is one more of B. Outside the interval all of it is off (Kynkäänniemi et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from latentgen.diffusion.array import Array, column, like, namespace
from latentgen.diffusion.denoiser import Condition, Denoise, Denoiser, halves
from latentgen.diffusion.noise import CONDITION, Noise
from latentgen.diffusion.schedule.protocol import Schedule
from latentgen.errors import InputError


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance (Sadat et al. 2025, algorithm 1), on the difference c − r of x0 estimates.

    eta: the share kept of the part parallel to c, which is what oversaturates (1 is plain guidance). norm: the most
    Euclidean norm the difference may have (r in the paper; None is no bound). momentum: beta, below 0 in the paper: the
    difference is added to beta times what it was in the step before.
    """

    eta: float = 0.0
    norm: float | None = None
    momentum: float = 0.0

    def __call__(self, difference: Array, conditional: Array) -> Array:
        """The difference, bounded and projected; all (B, …)."""
        if self.norm is not None:
            length = _norm(difference)
            difference = difference * namespace(length).clip(self.norm / (length + 1e-12), 0, 1)
        unit = conditional / (_norm(conditional) + 1e-12)
        parallel = _sum(difference * unit) * unit
        return difference - (1 - self.eta) * parallel


class Momentum:
    """The running difference of one walk, D = d + momentum·(D of the evaluation before): all that guidance remembers.

    A level noisier than the last begins another walk, and forgets.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.last: tuple[float, Array] | None = None

    def __call__(self, difference: Array, logsnr: float) -> Array:
        """The difference, with what is remembered."""
        if not self.momentum:
            return difference
        if self.last is not None and self.last[0] <= logsnr:
            difference = difference + self.momentum * self.last[1]
        self.last = (logsnr, difference)
        return difference


@dataclass(frozen=True)
class AnnealedCondition:
    """Condition-annealed sampling, CADS (Sadat et al. 2024, section 4): noise on the condition, fading as x clears.

    For t (1 is noise) at or below `low` the condition is itself, at or above `high` it is all noise, linear between:
    y' = sqrt(gamma)·y + scale·sqrt(1 − gamma)·n, brought back to y's mean and spread by the share `mixing` (psi).
    """

    noise: Noise
    schedule: Schedule
    low: float = 0.6
    high: float = 0.9
    scale: float = 0.1
    mixing: float = 1.0

    def __call__(self, condition: Condition, logsnr: float) -> Condition:
        """The condition as it is shown at this level; only `states` (B, L, D) are touched."""
        states = condition.states
        gamma = float(np.clip((self.high - time_of(self.schedule, logsnr)) / (self.high - self.low), 0, 1))
        if states is None or gamma == 1.0:
            return condition
        stream = CONDITION + (int(np.float64(logsnr).view(np.uint64)) >> 2)
        if condition.mask is None:
            return replace(condition, states=self._noised(states, self.noise, stream, gamma))
        xp, parts = namespace(states), []
        for row, length in enumerate(np.asarray(condition.mask).sum(axis=1).tolist()):  # of padding nothing is told
            own, noise = states[row : row + 1, :length], replace(self.noise, seeds=self.noise.seeds[row : row + 1])
            rest = states[row : row + 1, length:]
            parts.append(xp.concat((self._noised(own, noise, stream, gamma), rest), axis=1))
        return replace(condition, states=xp.concat(tuple(parts), axis=0))

    def _noised(self, states: Array, noise: Noise, stream: int, gamma: float) -> Array:
        fresh = like(noise.draw(stream, tuple(states.shape[1:])), states)
        noised = gamma**0.5 * states + self.scale * (1 - gamma) ** 0.5 * fresh
        restored = (noised - _mean(noised)) / (_spread(noised) + 1e-12) * _spread(states) + _mean(states)
        return self.mixing * restored + (1 - self.mixing) * noised


def guided(
    denoiser: Denoiser,
    condition: Condition,
    uncond: Condition | None = None,
    *,
    scale: float = 1.0,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    projection: Projection | None = None,
    annealed: AnnealedCondition | None = None,
    weaker: Denoiser | None = None,
    weaker_scale: float = 1.0,
    perturbed: Denoiser | None = None,
    perturbed_scale: float = 0.0,
    clip: float | None = None,
    threshold: float | None = None,
    threshold_max: float = 1.0,
    variance: bool = False,
) -> Denoise:
    """A Denoise with the condition, and guidance, built in.

    scale: w in out_u + w·(out_c − out_u) (Imagen's and diffusers' w; Ho & Salimans' is w − 1).
    rescale: phi in [0, 1], how far the guided output's standard deviation is brought back to the conditional one's
    (Lin et al. 2023, eq. 15 and 16). interval: (low, high) logSNR inside which guidance acts; None is everywhere.
    projection, annealed: APG and CADS. weaker, weaker_scale: autoguidance's other denoiser and its w. perturbed,
    perturbed_scale: the denoiser with perturbed attention and PAG's s, 0 being off.
    clip: bound of |x0| (pixel models). threshold: dynamic thresholding's quantile, in (0, 1], with the largest bound
    `threshold_max` (Saharia et al. 2022, section 2.3; 1 for pixels in [−1, 1]). variance: return (x0, v) for a network
    with learned variances. Raises InputError for a scale other than 1 without an `uncond`.
    """
    if scale != 1.0 and uncond is None:
        raise InputError(f"guidance scale {scale} needs an unconditional or negative condition")
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"the thresholding quantile is {threshold}; it must be in (0, 1]")
    others = [(weaker, weaker_scale - 1.0), (perturbed, perturbed_scale)]
    references = [(other, weight) for other, weight in others if other is not None and weight]
    running = Momentum(0.0 if projection is None else projection.momentum)
    pair = Joined()

    def denoise(x: Array, logsnr: float) -> Any:
        on = interval is None or interval[0] <= logsnr <= interval[1]
        shown = condition if annealed is None else annealed(condition, logsnr)
        if uncond is None or scale == 1.0 or not on:
            out = conditional = denoiser.output(x, logsnr, shown)
        else:
            out_u, conditional = both(denoiser, x, logsnr, pair(uncond, shown))
            out = out_u + scale * (conditional - out_u)
            if projection is not None:
                c, u = denoiser.x0(conditional, x, logsnr), denoiser.x0(out_u, x, logsnr)
                out = _as_output(denoiser, c + (scale - 1) * projection(running(c - u, logsnr), c), x, logsnr)
        if on and references:
            c = denoiser.x0(conditional, x, logsnr)
            x0 = denoiser.x0(out, x, logsnr)
            for other, weight in references:
                x0 = x0 + weight * (c - other(x, logsnr, shown))
            out = _as_output(denoiser, x0, x, logsnr)
        if rescale and out is not conditional:
            out = rescaled(halves(out, x)[0], halves(conditional, x)[0], rescale)
        x0 = bounded(denoiser.x0(out, x, logsnr), clip, threshold, threshold_max)
        return (x0, halves(conditional, x)[1]) if variance else x0

    return denoise


class Joined:
    """Two conditions one below the other: one object for as long as both are the same, by which networks know it."""

    def __init__(self) -> None:
        self.last: tuple[Condition, Condition, Condition] | None = None

    def __call__(self, uncond: Condition, condition: Condition) -> Condition:
        """The unconditional one first."""
        if self.last is None or self.last[0] is not uncond or self.last[1] is not condition:
            self.last = (uncond, condition, uncond.join(condition))
        return self.last[2]


def both(denoiser: Denoiser, x: Array, logsnr: float, joined: Condition) -> tuple[Array, Array]:
    """(unconditional, conditional) raw outputs (B, …) from one evaluation of 2B."""
    xp = namespace(x)
    out = denoiser.output(xp.concat((x, x), axis=0), logsnr, joined)
    return out[: x.shape[0]], out[x.shape[0] :]


def rescaled(out: Array, reference: Array, phi: float) -> Array:
    """phi of the way from `out` to `out` with the reference's standard deviation, row by row (Lin et al. 2023)."""
    return out * (phi * (_spread(reference) / _spread(out)) + (1 - phi))


def bounded(x0: Array, clip: float | None, threshold: float | None, threshold_max: float) -> Array:
    """x0 clipped to ±clip, or thresholded: each row clipped to its own quantile of |x0|, then divided by it."""
    if threshold is None:
        return x0 if clip is None else namespace(x0).clip(x0, -clip, clip)
    xp = namespace(x0)
    ordered = xp.sort(xp.reshape(xp.abs(x0), (x0.shape[0], -1)), axis=1)
    place = threshold * (ordered.shape[1] - 1)
    low = min(int(place), max(ordered.shape[1] - 2, 0))
    high = min(low + 1, ordered.shape[1] - 1)
    quantile = ordered[:, low] + (place - low) * (ordered[:, high] - ordered[:, low])
    bound = column(xp.clip(quantile, 1.0, max(threshold_max, 1.0)), x0)
    return xp.maximum(xp.minimum(x0, bound), -bound) / bound


def between(parts: tuple[float, float], knots: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The logSNRs from which the first and the last step are walked that lie in a part of the way, (0, 1) being all."""
    steps = len(knots) - 1
    first, last = (round(part * steps) for part in parts)
    first = min(first, steps - 1)  # there is always one
    return float(knots[first]), float(knots[max(first, last - 1)])


def time_of(schedule: Schedule, logsnr: float) -> float:
    """t in [0, 1] at which a schedule has this logSNR: bisection, for any decreasing schedule."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(schedule.logsnr(middle)) > logsnr else (low, middle)
    return 0.5 * (low + high)


def _as_output(denoiser: Denoiser, x0: Array, x: Array, logsnr: float) -> Array:
    alpha, sigma = denoiser.schedule.marginal(logsnr)
    return denoiser.prediction.join(x0, x, alpha, sigma)


def _rows(x: Array) -> Array:
    return namespace(x).reshape(x, (x.shape[0], -1))


def _sum(x: Array) -> Array:
    return column(namespace(x).sum(_rows(x), axis=1), x)


def _mean(x: Array) -> Array:
    return column(namespace(x).mean(_rows(x), axis=1), x)


def _norm(x: Array) -> Array:
    return _sum(x * x) ** 0.5


def _spread(x: Array) -> Array:
    """Standard deviation over all but the batch: (B, 1, …, 1)."""
    return column(namespace(x).std(_rows(x), axis=1), x)
