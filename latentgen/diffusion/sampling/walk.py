"""What every sampler shares: the walk along the knots, and what is yielded after each step."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from latentgen.diffusion.array import Array
from latentgen.diffusion.schedule.protocol import LOGSNR_MAX, LOGSNR_MIN
from latentgen.errors import InputError

Marginal = Callable[[Any], tuple[Any, Any]]  # logsnr -> (alpha, sigma)
Denoise = Callable[[Array, float], Array]  # (x (B, …), logsnr) -> x0 (B, …)
DROWNED = -8.0  # logSNR below which an x0 is hardly more than the data's mean; Stable Diffusion starts at −5.4


class Step(NamedTuple):
    """What a sampler yields after step `index`: x (B, …), now at `logsnr`, and the x0 it was moved by."""

    index: int  # type: ignore[assignment]  # tuple.index is not wanted here
    x: Array
    x0: Array
    logsnr: float


class Leg(NamedTuple):
    """One step of the walk, from the noisier end (alpha, sigma at logsnr) to the next knot.

    h is the step in lambda = logsnr/2, the variable of the DPM-Solver papers.
    """

    index: int  # type: ignore[assignment]
    logsnr: float
    alpha: float
    sigma: float
    next_logsnr: float
    next_alpha: float
    next_sigma: float
    first: bool
    last: bool

    @property
    def h(self) -> float:
        """lambda_next − lambda (Lu et al. 2022, section 3)."""
        return 0.5 * (self.next_logsnr - self.logsnr)

    @property
    def to_clean(self) -> bool:
        """Whether the step ends without noise, so that the next x is x0 itself."""
        return self.next_logsnr >= LOGSNR_MAX

    @property
    def simple(self) -> bool:
        """Whether only a first-order step is defined: to clean, where lambda has no end, or to the same level."""
        return self.to_clean or self.next_logsnr == self.logsnr

    @property
    def drowned(self) -> bool:
        """Whether the step starts from pure noise."""
        return self.logsnr < DROWNED

    @property
    def leaps(self) -> bool:
        """Whether the step goes from pure noise to less than a tenth of its sigma/alpha, as the first often does."""
        return self.drowned and self.h > math.log(10)

    @property
    def ratio(self) -> float:
        """1 − (SNR here)/(SNR next): the share of the noise that is new in an ancestral step, in [0, 1]."""
        return -math.expm1(self.logsnr - self.next_logsnr)


def legs(knots: np.ndarray, marginal: Marginal) -> Iterator[Leg]:
    """The shared prologue: the checked knots, two by two, with their marginals.

    Raises InputError unless knots are at least two finite, bounded numbers that rise; the last may be the one before.
    """
    levels = [float(level) for level in knots]
    if len(levels) < 2 or not all(LOGSNR_MIN <= level <= LOGSNR_MAX for level in levels):
        raise InputError("knots must be two or more logSNR levels inside the schedule's bounds")
    if any(after <= before for before, after in pairwise(levels[:-1])) or levels[-1] < levels[-2]:
        raise InputError("knots must go from noise to clean: logSNR must rise at every step (the last may stay)")
    return _legs(levels, marginal)


def _legs(levels: list[float], marginal: Marginal) -> Iterator[Leg]:
    steps = len(levels) - 1
    alpha, sigma = marginal(levels[0])
    for i in range(steps):
        next_alpha, next_sigma = marginal(levels[i + 1])
        ends = (levels[i], float(alpha), float(sigma), levels[i + 1], float(next_alpha), float(next_sigma))
        yield Leg(i, *ends, first=i == 0, last=i == steps - 1)
        alpha, sigma = next_alpha, next_sigma
