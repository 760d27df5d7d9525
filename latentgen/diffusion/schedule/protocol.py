"""What a schedule is, the bounds of logSNR, and the frames x = alpha·x0 + sigma·eps it can live in."""

from typing import Any, Protocol

from latentgen.diffusion.array import Level, clamp, exp, sqrt

LOGSNR_MIN = -40.0  # alpha = 2e-9: zero terminal SNR, yet every quotient stays finite in float32
LOGSNR_MAX = 40.0  # sigma = 2e-9: clean to float32


class Schedule(Protocol):
    """A decreasing logSNR over t in [0, 1], in a frame, and what the network is told at a logSNR.

    All three take a Python float or an array (NumPy or torch) and return the same kind.
    """

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """(alpha, sigma) at a logSNR."""
        ...

    def logsnr(self, t: Level) -> Any:
        """log(alpha²/sigma²) at t; decreasing, within [LOGSNR_MIN, LOGSNR_MAX]; t = 0 is the clean end."""
        ...

    def time(self, logsnr: Level) -> Any:
        """What the network is told at this logSNR."""
        ...


def bounded(logsnr: Level) -> Any:
    """logSNR held inside its finite bounds."""
    return clamp(logsnr, LOGSNR_MIN, LOGSNR_MAX)


def variance_preserving(logsnr: Level) -> tuple[Any, Any]:
    """alpha² + sigma² = 1: alpha² = sigmoid(logsnr), sigma² = sigmoid(−logsnr) (Kingma et al. 2021, section 3.2)."""
    return sqrt(1 / (1 + exp(-logsnr))), sqrt(1 / (1 + exp(logsnr)))


def variance_exploding(logsnr: Level) -> tuple[Any, Any]:
    """alpha = 1, sigma = exp(−logsnr/2) (Song et al. 2021, section 3.4)."""
    sigma = exp(-0.5 * logsnr)
    return 1.0 + 0.0 * sigma, sigma


def straight_line(logsnr: Level) -> tuple[Any, Any]:
    """alpha + sigma = 1, the frame of rectified flow: alpha = sigmoid(logsnr/2)."""
    return 1 / (1 + exp(-0.5 * logsnr)), 1 / (1 + exp(0.5 * logsnr))
