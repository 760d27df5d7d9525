"""Schedules given by a table of betas, as DDPM and every Stable Diffusion checkpoint has them.

The table is float32, since the checkpoints were trained against float32 tables: a float64 product of the same betas
differs from theirs by 1e-4 in sigma at the clean end. Between the entries it is interpolated.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from latentgen.diffusion.array import Level, exp, is_number, namespace
from latentgen.diffusion.schedule.protocol import LOGSNR_MAX, LOGSNR_MIN, variance_preserving
from latentgen.errors import InputError

Interpolation = Literal["logsnr", "sigma"]
Rounding = Literal["none", "nearest", "down"]


def linear_betas(levels: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Equally spaced betas (Ho et al. 2020, section 4)."""
    return _linspace32(start, end, levels)


def scaled_linear_betas(levels: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Equally spaced square roots of beta: latent diffusion's own (Rombach et al. 2022)."""
    return _linspace32(math.sqrt(start), math.sqrt(end), levels) ** 2


def cosine_betas(levels: int = 1000, max_beta: float = 0.999) -> np.ndarray:
    """Squared-cosine alpha-bar with betas capped (Nichol & Dhariwal 2021, eq. 17): diffusers' squaredcos_cap_v2."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / levels) / alpha_bar(i / levels), max_beta) for i in range(levels)]
    return np.array(betas, dtype=np.float32)


def sigmoid_betas(levels: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas along a sigmoid (Xu et al. 2022, GeoDiff), as diffusers' DDPMScheduler has it."""
    ramp = 1 / (1 + np.exp(-_linspace32(-6, 6, levels)))
    return (ramp * (end - start) + start).astype(np.float32)


def cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    """alpha-bar: the running product of 1 − beta, summed up in float64 and stored in float32, as torch does it."""
    alphas = np.float32(1) - np.asarray(betas, dtype=np.float32)
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas shifted and scaled so that the last alpha-bar is exactly 0 (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(cumulative_alphas(betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    return np.float32(1) - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def _linspace32(start: float, end: float, count: int) -> np.ndarray:
    """float32 equally spaced numbers as torch.linspace makes them: each half counted from its own end."""
    first, last, index = np.float32(start), np.float32(end), np.arange(count)
    step = np.float32((last - first) / np.float32(max(count - 1, 1)))
    low = first.astype(np.float64) + step.astype(np.float64) * index  # one rounding, as a fused multiply-add has
    high = last.astype(np.float64) - step.astype(np.float64) * (count - 1 - index)
    return np.where(index < count // 2, low, high).astype(np.float32)


@dataclass(frozen=True, repr=False)
class Discrete:
    """A table of alpha-bar (N entries, decreasing) in the VP frame; `time` is the table's index, 0 … N − 1.

    t = i/(N − 1) is entry i. Between entries either logSNR ("logsnr") or sigma/alpha ("sigma", what diffusers' Euler
    family does) is linear in the index. `floor` replaces an alpha-bar of 0 where a sampler needs sigma/alpha finite;
    without it logSNR is clamped. `rounding` is what happens to the index before the network is told: some diffusers
    schedulers round or cut it. Raises InputError for a table that does not fall.
    """

    table: tuple[float, ...]
    interpolation: Interpolation = "logsnr"
    rounding: Rounding = "none"
    floor: float = 0.0

    def __post_init__(self) -> None:
        table = np.asarray(self.table)
        if table.ndim != 1 or len(table) < 2 or not (np.all(np.diff(table) < 0) and table[-1] >= 0 and table[0] < 1):
            raise InputError("a table of alphas_cumprod must fall strictly, from below 1 to 0 or above")

    @classmethod
    def from_betas(cls, betas: np.ndarray, *, rescale_betas_zero_snr: bool = False, **options: Any) -> "Discrete":
        """The schedule of a list of betas; `options` are this class's other fields."""
        betas = np.asarray(betas, dtype=np.float32)
        betas = zero_terminal_snr(betas) if rescale_betas_zero_snr else betas
        return cls(tuple(cumulative_alphas(betas).tolist()), **options)

    @classmethod
    def linear(cls, levels: int = 1000, start: float = 1e-4, end: float = 0.02, **options: Any) -> "Discrete":
        """Ho et al. 2020. Options: rescale_betas_zero_snr, interpolation, rounding, floor."""
        return cls.from_betas(linear_betas(levels, start, end), **options)

    @classmethod
    def scaled_linear(
        cls, levels: int = 1000, start: float = 0.00085, end: float = 0.012, **options: Any
    ) -> "Discrete":
        """Stable Diffusion's. Options: rescale_betas_zero_snr, interpolation, rounding, floor."""
        return cls.from_betas(scaled_linear_betas(levels, start, end), **options)

    @classmethod
    def cosine(cls, levels: int = 1000, max_beta: float = 0.999, **options: Any) -> "Discrete":
        """Nichol & Dhariwal 2021. Options: rescale_betas_zero_snr, interpolation, rounding, floor."""
        return cls.from_betas(cosine_betas(levels, max_beta), **options)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Discrete({len(self)} levels, logsnr {self.levels[0]:.2f} to {self.levels[-1]:.2f})"

    @cached_property
    def levels(self) -> np.ndarray:
        """logSNR of every entry, float64 (N,), bounded; entry 0 is the cleanest."""
        alpha_bar = np.maximum(np.asarray(self.table), self.floor)
        with np.errstate(divide="ignore"):
            return np.clip(np.log(alpha_bar) - np.log1p(-alpha_bar), LOGSNR_MIN, LOGSNR_MAX)

    @cached_property
    def _axis(self) -> np.ndarray:
        """What is linear between the entries, float64 (N,), increasing with the index: −logSNR or sigma/alpha."""
        return np.exp(-0.5 * self.levels) if self.interpolation == "sigma" else -self.levels

    @cached_property
    def _levels_listed(self) -> list[float]:
        return [float(level) for level in self.levels]  # Python's own numbers: a lookup in NumPy's costs far more

    @cached_property
    def _axis_listed(self) -> list[float]:
        return [float(place) for place in self._axis]

    def marginal(self, logsnr: Level) -> tuple[Any, Any]:
        """The VP frame."""
        return variance_preserving(logsnr)

    def at(self, index: Level) -> Any:
        """logSNR at a table index in [0, N − 1], exact at whole numbers."""
        if is_number(index) and float(index).is_integer() and 0 <= index < len(self.table):
            return self._levels_listed[int(index)]
        if self.interpolation == "logsnr":
            return -_interpolate(index, self._axis)
        if is_number(index) and not float(index).is_integer():
            return -2 * math.log(_interpolate(index, self._axis))
        exact = -_interpolate(index, -self.levels)  # for whole indices: no round trip through exp and log
        if is_number(index):
            return float(exact)
        xp = namespace(index)
        return xp.where(index == xp.round(index), exact, -2 * xp.log(_interpolate(index, self._axis)))

    def logsnr(self, t: Level) -> Any:
        """logSNR at t in [0, 1]."""
        return self.at(t * (len(self.table) - 1))

    def time(self, logsnr: Level) -> Any:
        """The table index of a logSNR, as a float in [0, N − 1]; beyond the table's ends, its ends."""
        value = exp(-0.5 * logsnr) if self.interpolation == "sigma" else -logsnr
        if is_number(value):
            index: Any = _located(float(value), self._axis_listed)
            if self.rounding == "none":
                return index
            return float(round(index) if self.rounding == "nearest" else math.floor(index + 1e-4))
        index = _locate(value, self._axis)
        if self.rounding == "none":
            return index
        xp = namespace(index)
        # 1e-4 of an entry: an index that is whole but for the round trip through logSNR stays whole
        return xp.round(index) if self.rounding == "nearest" else xp.floor(index + 1e-4)


@lru_cache(maxsize=4)
def _counting(entries: int) -> np.ndarray:
    return np.arange(float(entries))


def _interpolate(index: Level, table: np.ndarray) -> Any:
    """The table's value at a fractional index, linear between the entries."""
    if is_number(index):
        return float(np.interp(index, _counting(len(table)), table))
    xp = namespace(index)
    if xp is np or isinstance(index, np.ndarray):
        return np.interp(index, np.arange(len(table)), table).astype(np.result_type(index, np.float32), copy=False)
    values = xp.asarray(table, dtype=index.dtype, device=index.device)
    index = xp.clip(index, 0, len(table) - 1)
    low = xp.clip(xp.floor(index), 0, len(table) - 2)
    start = xp.astype(low, xp.int64)
    below, above = values[start], values[start + 1]
    return below + (index - low) * (above - below)


def _located(value: float, table: list[float]) -> float:
    """The fractional index at which an increasing table takes a value."""
    high = min(max(bisect_left(table, value), 1), len(table) - 1)
    below, above = table[high - 1], table[high]
    return high - 1 + min(max((value - below) / (above - below), 0.0), 1.0)


def _locate(value: Any, table: np.ndarray) -> Any:
    """The same of an array of values, of its kind and dtype."""
    xp = namespace(value)
    if isinstance(value, np.ndarray):
        return np.interp(value, table, np.arange(len(table))).astype(np.result_type(value, np.float32), copy=False)
    values = xp.asarray(table, dtype=value.dtype, device=value.device)
    high = xp.clip(xp.searchsorted(values, value), 1, len(table) - 1)
    below, above = values[high - 1], values[high]
    return xp.astype(high - 1, value.dtype) + xp.clip((value - below) / (above - below), 0, 1)
