"""Data whose every diffusion is known in closed form: a Gaussian, and mixtures of them."""

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np


@dataclass(frozen=True)
class Mixture:
    """sum over k of weight_k · N(mean_k, std_k²) for every coordinate, independently, in a frame's marginal."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]
    marginal: Any

    def _parts(self, x: Any, logsnr: Any) -> Any:
        xp = array_api_compat.array_namespace(x)
        alpha, sigma = self.marginal(logsnr)
        if not isinstance(alpha, float):
            alpha, sigma = (xp.reshape(part, (-1,) + (1,) * (x.ndim - 1)) for part in (alpha, sigma))
        spreads = [alpha**2 * std**2 + sigma**2 for std in self.stds]
        logs = [
            math.log(w) - 0.5 * (x - alpha * m) ** 2 / v - 0.5 * (xp.log(v) if hasattr(v, "shape") else math.log(v))
            for w, m, v in zip(self.weights, self.means, spreads, strict=True)
        ]
        top = logs[0]
        for other in logs[1:]:
            top = xp.maximum(top, other)
        return xp, alpha, sigma, spreads, [xp.exp(part - top) for part in logs], top

    def denoise(self, x: Any, logsnr: Any) -> Any:
        """E[x0 | x]: each component's linear estimate, weighted by how likely it made x."""
        _, alpha, _, spreads, shares, _ = self._parts(x, logsnr)
        total = sum(shares)
        estimate = 0.0
        for share, mean, std, spread in zip(shares, self.means, self.stds, spreads, strict=True):
            estimate = estimate + share / total * (mean + alpha * std**2 / spread * (x - alpha * mean))
        return estimate

    def log_density(self, x: Any, logsnr: float) -> Any:
        """log p(x) of the noised data, summed over all but the batch."""
        xp, _, _, _, shares, top = self._parts(x, logsnr)
        each = top + xp.log(sum(shares)) - 0.5 * math.log(2 * math.pi)
        return xp.sum(xp.reshape(each, (x.shape[0], -1)), axis=1)

    def draw(self, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
        generator = np.random.default_rng(seed)
        which = generator.choice(len(self.means), size=shape, p=self.weights)
        return np.array(self.means)[which] + np.array(self.stds)[which] * generator.standard_normal(shape)


def gaussian(mean: float, std: float, marginal: Any) -> Mixture:
    return Mixture((mean,), (std,), (1.0,), marginal)


def two_modes(marginal: Any) -> Mixture:
    return Mixture((-1.0, 0.6), (0.2, 0.35), (0.4, 0.6), marginal)
