"""The probability-flow ODE with an adaptive solver of stated tolerance."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from latentgen.diffusion.array import Array, namespace
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling.walk import Denoise, Marginal, Step, legs
from latentgen.diffusion.schedule.protocol import LOGSNR_MAX, variance_preserving
from latentgen.errors import InputError

# Dormand & Prince 1980, RK5(4)7M: rows of the stages, the fifth-order weights, and their difference to the fourth
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

Slope = Callable[[Array, float], Array]  # (y, time) -> dy/dtime


class Accepted(NamedTuple):
    """An accepted step of the solver: y at `time`, and the slope there."""

    y: Array
    time: float
    slope: Array


def dormand_prince(
    slope: Slope, y: Array, start: float, end: float, *, rtol: float, atol: float, most: int = 10_000
) -> Iterator[Accepted]:
    """Every accepted step of dy/dtime = slope(y, time), from start to end, in either direction.

    A step is accepted when the root mean square over y of |error|/(atol + rtol·|y|) is at most 1. Six evaluations a
    step. Raises InputError for tolerances not above 0, for a slope that is not finite, and when `most` steps are not
    enough.
    """
    if not (rtol > 0 and atol > 0):
        raise InputError("the tolerances of the adaptive solver must be above 0")
    time, first = start, slope(y, start)
    size = 0.05 * (end - start)
    for _ in range(most):
        if time == end:
            return
        if abs(size) >= abs(end - time):
            size = end - time
        slopes, reached = [first], y
        for stage, place in zip(STAGES[1:], PLACES[1:], strict=True):
            reached = y
            for weight, k in zip(stage, slopes, strict=True):
                reached = reached + (size * weight) * k
            slopes.append(slope(reached, time + place * size))
        error = sum((size * weight) * k for weight, k in zip(ERROR, slopes, strict=True))
        norm = _error_norm(error, y, reached, rtol, atol)
        if not math.isfinite(norm) and not bool(namespace(y).all(namespace(y).isfinite(error))):
            raise InputError(f"the network's output is not finite at logSNR {time:.2f}")
        if norm <= 1.0:
            time = end if size == end - time else time + size
            y, first = reached, slopes[-1]  # the last stage is the next step's first
            yield Accepted(y, time, first)
        size *= min(5.0, max(0.2, 0.9 * max(norm, 1e-10) ** -0.2))
    raise InputError(f"the adaptive solver did not reach its end in {most} steps; loosen the tolerances")


def _error_norm(error: Array, before: Array, after: Array, rtol: float, atol: float) -> float:
    xp = namespace(before)
    scale = atol + rtol * xp.maximum(xp.abs(before), xp.abs(after))
    return float(xp.mean((error / scale) ** 2)) ** 0.5


def flow_slope(denoise: Denoise) -> Slope:
    """dx/dlogsnr of the probability-flow ODE in the VP frame: (alpha·sigma² x0 − sigma·alpha² eps)/2.

    From x = alpha·x0 + sigma·eps with dalpha/dlambda = alpha·sigma², dsigma/dlambda = −sigma·alpha² and
    lambda = logsnr/2 (Song et al. 2021, eq. 13, in logSNR). x and its slope stay of order 1 at every level.
    """

    def slope(x: Array, logsnr: float) -> Array:
        alpha = variance_preserving(logsnr)[0]
        return 0.5 * alpha * (denoise(x, logsnr) - alpha * x)  # sigma² x0 − sigma·alpha·eps = x0 − alpha·x

    return slope


def probability_flow(
    denoise: Denoise,
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    end: float | None = None,
) -> Iterator[Step]:
    """The probability-flow ODE by Dormand–Prince 5(4) (Song et al. 2021, section 4.3); yields each accepted step.

    Of the knots only the ends matter: it walks from the first to the last, or, where the last knot is clean, to `end`
    (logSNR; None is the last knot that has noise), and takes the x0 there. That step is Euler's, of an error that the
    tolerance does not know: `plan_for` sets `end` to the schedule's cleanest level, where the noise left is hardly
    seen. The error is that of the variance-preserving x, whatever the frame; steps are chosen for the batch as a whole,
    so `walked` gives it one picture at a time.
    """
    levels = [leg.logsnr for leg in legs(knots, marginal)] + [float(knots[-1])]
    clean = levels[-1] >= LOGSNR_MAX
    end = levels[-1] if not clean else levels[-2] if end is None else end

    def scale(logsnr: float) -> float:
        """From the VP frame to the marginal's."""
        return float(marginal(logsnr)[0]) / variance_preserving(logsnr)[0]

    def framed(y: Array, logsnr: float) -> Array:
        return denoise(scale(logsnr) * y, logsnr)

    y, index = x / scale(levels[0]), -1
    for index, step in enumerate(dormand_prince(flow_slope(framed), y, levels[0], end, rtol=rtol, atol=atol)):
        y, alpha = step.y, variance_preserving(step.time)[0]
        yield Step(index, scale(step.time) * y, 2 / alpha * step.slope + alpha * y, step.time)
    if clean:
        x0 = framed(y, end)
        yield Step(index + 1, float(marginal(levels[-1])[0]) * x0, x0, levels[-1])
