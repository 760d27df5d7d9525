"""Schedules given by a formula: each a logSNR that falls over t in [0, 1], a frame, and what the network is told.

The frame and the schedule are separate choices (Kingma et al. 2021; Karras et al. 2022): samplers, losses and bounds
see logSNR only. The network is told 1000·t unless the source says otherwise, so one time embedding serves them all.
"""

import math
from dataclasses import dataclass
from typing import Any

from latentgen.diffusion.array import Level, atan, clamp, exp, log, sin, sqrt
from latentgen.diffusion.schedule.protocol import (
    bounded,
    straight_line,
    variance_exploding,
    variance_preserving,
)

TINY = 1e-20  # below the smallest square of alpha or sigma inside the bounds of logSNR


def _log(value: Any) -> Any:
    """log, with 0 (the exact end of a schedule) taken as the smallest number the bounds need."""
    return log(clamp(value, TINY, math.inf))


@dataclass(frozen=True)
class Linear:
    """Linear beta(t) in continuous time, the VP SDE (Song et al. 2021, eq. 11 and appendix C): DDPM's limit."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VP frame."""
        return variance_preserving(logsnr)

    def logsnr(self, t: Level) -> Any:
        """alpha² = exp(−B) with B the integral of beta, so logsnr = −log(e^B − 1)."""
        return bounded(-self._log_expm1(self._integral(t)))

    def time(self, logsnr: Level) -> Any:
        """1000·t."""
        return 1000 * self._inverse(log(1 + exp(-logsnr)))

    def _integral(self, t: Level) -> Any:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t

    def _inverse(self, integral: Any) -> Any:
        """t at which the integral of beta has this value: the root of a quadratic, in the form that does not cancel."""
        rise = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + sqrt(self.beta_min**2 + 2 * rise * integral))

    @staticmethod
    def _log_expm1(value: Any) -> Any:
        return value + _log(1 - exp(-value))


@dataclass(frozen=True)
class SubVP(Linear):
    """The sub-VP SDE (Song et al. 2021, eq. 14 and 29): alpha as in Linear, sigma = 1 − alpha²."""

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """alpha/sigma = r and sigma = 1 − alpha² give sigma = 2/(1 + sqrt(1 + 4r²)) and alpha = r·sigma."""
        r = exp(0.5 * logsnr)
        sigma = 2 / (1 + sqrt(1 + 4 * r * r))
        return r * sigma, sigma

    def logsnr(self, t: Level) -> Any:
        """2·log(alpha/(1 − alpha²))."""
        integral = self._integral(t)
        return bounded(-integral - 2 * _log(1 - exp(-integral)))

    def time(self, logsnr: Level) -> Any:
        """1000·t."""
        alpha, _ = self.marginal(logsnr)
        return 1000 * self._inverse(-2 * _log(alpha))


@dataclass(frozen=True)
class Cosine:
    """logsnr = −2·log tan(πt/2) + 2·log(base/size) (Nichol & Dhariwal 2021; Hoogeboom et al. 2023, eq. 4 and 5).

    size/base > 1 shifts the noise up for pictures larger than `base`, as simple diffusion does.
    """

    size: float = 64.0
    base: float = 64.0

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VP frame."""
        return variance_preserving(logsnr)

    def logsnr(self, t: Level) -> Any:
        """tan is taken as a quotient of sines, so that both ends are exact."""
        tangent = _log(sin(0.5 * math.pi * t)) - _log(sin(0.5 * math.pi * (1 - t)))
        return bounded(-2 * tangent + 2 * math.log(self.base / self.size))

    def time(self, logsnr: Level) -> Any:
        """1000·t."""
        return 2000 / math.pi * atan(exp(-0.5 * logsnr + math.log(self.base / self.size)))


@dataclass(frozen=True)
class UniformLogsnr:
    """logsnr falling linearly in t, between two ends, in the VP frame (the fixed schedule of Kingma et al. 2021)."""

    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VP frame."""
        return variance_preserving(logsnr)

    def logsnr(self, t: Level) -> Any:
        """logsnr_max at 0, logsnr_min at 1."""
        return self.logsnr_max + (self.logsnr_min - self.logsnr_max) * t

    def time(self, logsnr: Level) -> Any:
        """1000·t."""
        return 1000 * (logsnr - self.logsnr_max) / (self.logsnr_min - self.logsnr_max)


@dataclass(frozen=True)
class VE:
    """sigma from sigma_min to sigma_max geometrically, alpha = 1: the VE SDE (Song et al. 2021, eq. 9; NCSN)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VE frame."""
        return variance_exploding(logsnr)

    def logsnr(self, t: Level) -> Any:
        """−2·log sigma."""
        return -2 * (math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * t)

    def time(self, logsnr: Level) -> Any:
        """1000·t."""
        return -500 * (logsnr + 2 * math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022, eq. 5: sigma^(1/rho) linear in t. The network is told log(sigma)/4 (their c_noise).

    x0 here is their data divided by sigma_data, and the frame is VP: then their c_in is already in x, and their
    preconditioning c_skip, c_out (table 1) is the v prediction, up to its sign.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VP frame: alpha = sigma_data/sqrt(sigma² + sigma_data²)."""
        return variance_preserving(logsnr)

    def logsnr(self, t: Level) -> Any:
        """2·log(sigma_data/sigma)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return 2 * math.log(self.sigma_data) - 2 * self.rho * log(low + (high - low) * t)

    def time(self, logsnr: Level) -> Any:
        """log(sigma)/4."""
        return 0.25 * (math.log(self.sigma_data) - 0.5 * logsnr)


@dataclass(frozen=True)
class RectifiedFlow:
    """x = (1 − s)·x0 + s·eps with s = shift·t/(1 + (shift − 1)·t) (Liu et al. 2022; Esser et al. 2024, eq. 23).

    shift 1 is the straight line; Stable Diffusion 3's is 3. The network is told 1000·s.
    """

    shift: float = 1.0

    @classmethod
    def for_resolution(cls, pixels: float, base_pixels: float) -> "RectifiedFlow":
        """The shift that keeps the noise's visibility from base_pixels to pixels: sqrt(pixels/base) (ibid.)."""
        return cls(math.sqrt(pixels / base_pixels))

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The flow frame: alpha + sigma = 1."""
        return straight_line(logsnr)

    def logsnr(self, t: Level) -> Any:
        """2·log((1 − s)/s) = 2·log((1 − t)/t) − 2·log(shift)."""
        return bounded(2 * (_log(1 - t) - _log(t)) - 2 * math.log(self.shift))

    def time(self, logsnr: Level) -> Any:
        """1000·s."""
        return 1000 * straight_line(logsnr)[1]


@dataclass(frozen=True)
class Learned:
    """A monotone network as the schedule (Kingma et al. 2021, appendix H), between two given ends, in the VP frame.

    g(t) = l1(t) + l3(sigmoid(l2(l1(t)))), three linear layers of positive weights, scaled so that the ends are
    logsnr_max at 0 and logsnr_min at 1. The arrays: w1, b1 scalars (1,); w2, b2, w3 (H,). As torch tensors they take
    gradients: `loss.learned_schedule` makes such a one. The network is told 1000·(share of the way in logSNR).
    """

    w1: Any
    b1: Any
    w2: Any
    b2: Any
    w3: Any
    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VP frame."""
        return variance_preserving(logsnr)

    def logsnr(self, t: Level) -> Any:
        """An array of t's shape, of the weights' kind."""
        start, end = self._rise(0.0 * self.w1), self._rise(0.0 * self.w1 + 1)
        share = (self._rise(t + 0.0 * self.w1) - start) / (end - start)
        return self.logsnr_max + (self.logsnr_min - self.logsnr_max) * share

    def time(self, logsnr: Level) -> Any:
        """1000·(logsnr_max − logsnr)/(logsnr_max − logsnr_min)."""
        return 1000 * (self.logsnr_max - logsnr) / (self.logsnr_max - self.logsnr_min)

    def _rise(self, t: Any) -> Any:
        first = abs(self.w1) * t + self.b1  # (B,)
        hidden = 1 / (1 + exp(-(abs(self.w2) * first[..., None] + self.b2)))  # (B, H)
        return first + (abs(self.w3) * hidden).sum(-1)
