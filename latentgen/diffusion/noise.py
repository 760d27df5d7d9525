"""Noise from counters: a pure function of (seed, stream), the same on every device and at every batch size.

Philox 4x64 (Salmon et al. 2011) keyed by (seed, stream); stream 0 is the initial noise, stream 1 + i the noise of
step i. Picture k of a batch draws from its own seed alone, so it is the picture of that seed rendered by itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from latentgen.diffusion.array import Array, like
from latentgen.errors import InputError

INITIAL = 0  # the stream of the first noise
FIRST_STEP = 1  # step i draws from stream 1 + i
CONDITION = 1 << 62  # streams from here on perturb conditions, by the level they are shown at
BROWNIAN = 1 << 63  # streams from here on belong to Brownian paths


def normal(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of the given shape: always the same for the same (seed, stream, shape).

    Box & Muller 1958 on the counter's raw words, whose values NumPy promises to keep; the stream of its own normal
    generator it does not.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    raw = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(pairs)
    words = np.asarray(raw, dtype="<u8").view("<u4").astype(np.float32)
    radius = np.sqrt(np.float32(-2) * np.log((words[:pairs] + np.float32(0.5)) * np.float32(2.0**-32)))
    angle = words[pairs:] * np.float32(2 * math.pi * 2.0**-32)
    drawn = np.empty(2 * pairs, dtype=np.float32)
    np.multiply(radius, np.cos(angle), out=drawn[:pairs])
    np.multiply(radius, np.sin(angle), out=drawn[pairs:])
    return drawn[:count].reshape(shape)


def quick_normal(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of the given shape, in half the time of `normal`: 16 of the counter's bits a number.

    The inverse of the normal distribution function at the midpoints of 2^16 equal parts, looked up; the largest is
    4.3 standard deviations. For the noise of steps and paths, of which there is much.
    """
    count = math.prod(shape)
    raw = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(-(-count // 4))
    words = np.asarray(raw, dtype="<u8").view("<u2")[:count]
    return quantiles().take(words, mode="wrap").reshape(shape)


@lru_cache(maxsize=1)
def quantiles() -> np.ndarray:
    """The normal quantiles at (k + 1/2)/2^16, of variance 1: float32 (65536,), rising."""
    inverse = NormalDist().inv_cdf  # Wichura 1988, AS 241
    half = np.array([inverse((k + 0.5) / 65536) for k in range(32768)])
    return np.asarray(np.concatenate([half, -half[::-1]]) / np.sqrt(np.mean(half**2)), dtype=np.float32)


def rows(normals: Callable[[int, int, tuple[int, ...]], np.ndarray], seeds: Sequence[int], *of: Any) -> np.ndarray:
    """One draw for each seed, (B, *shape)."""
    if len(seeds) == 1:
        return normals(seeds[0], *of)[None]
    return np.stack([normals(seed, *of) for seed in seeds])


@dataclass(frozen=True)
class Noise:
    """One stream of noise for each row of the batch, `seeds[k]` for row k. A seed is an integer in [0, 2**64)."""

    seeds: tuple[int, ...]

    def __init__(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if not 0 <= int(seed) < 1 << 64:
                raise InputError(f"seed {seed} is out of range; a seed is a whole number from 0 to 2**64 − 1")
        object.__setattr__(self, "seeds", tuple(int(seed) for seed in seeds))

    def __len__(self) -> int:
        return len(self.seeds)

    def draw(self, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 (B, *shape) of one stream."""
        return rows(normal, self.seeds, stream, shape)

    def initial(self, shape: tuple[int, ...]) -> np.ndarray:
        """The noise a picture starts from: float32 (B, *shape); `shape` is without the batch."""
        return self.draw(INITIAL, tuple(shape))

    def step(self, index: int, like_: Array, span: tuple[float, float] | None = None) -> Array:
        """Fresh noise for step `index` (from 0), of the shape, library, dtype and device of `like_` (B, …).

        span: the (logsnr, next logsnr) the step walks; independent noise has no use for it, a Brownian path has.
        """
        if like_.shape[0] != len(self.seeds):
            raise InputError(f"a batch of {like_.shape[0]} rows needs as many seeds, not {len(self.seeds)}")
        return like(rows(quick_normal, self.seeds, FIRST_STEP + index, tuple(like_.shape[1:])), like_)

    def brownian(self) -> "Noise":
        """The Brownian path of the same seeds, for samplers that follow one path however many steps they take."""
        return Brownian(self.seeds)


class Brownian(Noise):
    """Noise as the normalised increments of one Brownian path a picture, its clock being logSNR.

    The reverse SDE's noise over a short step is sigma·dW with W's clock logSNR, so a run of more steps refines the
    same picture. The path is a Brownian tree: independent unit cells, each bisected by bridges as deep as the point
    asked for, every node drawn from its own counter. Levels are rounded to 2**−DEPTH, where the tree ends.
    """

    DEPTH = 8

    def step(self, index: int, like_: Array, span: tuple[float, float] | None = None) -> Array:
        """(W(next) − W(now))/sqrt(next − now) for the `span` walked: standard normal, like `like_` (B, …)."""
        if span is None or not span[0] < span[1]:
            raise InputError("a Brownian path needs the span of logSNR that the step walks")
        if like_.shape[0] != len(self.seeds):
            raise InputError(f"a batch of {like_.shape[0]} rows needs as many seeds, not {len(self.seeds)}")
        unit, shape = 1 << self.DEPTH, tuple(like_.shape[1:])
        now = round(span[0] * unit)
        after = max(round(span[1] * unit), now + 1)
        (first, start), (last, end) = divmod(now, unit), divmod(after, unit)
        total = _within(self.seeds, last, end, shape) - _within(self.seeds, first, start, shape)
        for cell in range(first, last):
            total = total + _node(self.seeds, cell, 0, shape)
        total *= np.float32(math.sqrt(unit / (after - now)))
        return like(total, like_)

    def brownian(self) -> "Noise":
        """Itself."""
        return self


@lru_cache(maxsize=4)
def _within(seeds: tuple[int, ...], cell: int, place: int, shape: tuple[int, ...]) -> Any:
    """W(cell + place/2**DEPTH) − W(cell), for place in [0, 2**DEPTH); one step's end, kept, is the next one's start."""
    if place == 0:
        return np.float32(0)
    low, width, node = 0, 1 << Brownian.DEPTH, 1
    left: Any = np.float32(0)
    right: Any = _node(seeds, cell, 0, shape)
    while place != low:
        width //= 2
        spread = np.float32(math.sqrt(width / (2 << Brownian.DEPTH)))  # of the middle of a bridge over 2·width
        middle = left + right
        middle *= np.float32(0.5)
        middle += spread * _node(seeds, cell, node, shape)
        upper = place >= low + width
        low, left, right = (low + width, middle, right) if upper else (low, left, middle)
        node = 2 * node + upper
    return left


def _node(seeds: tuple[int, ...], cell: int, node: int, shape: tuple[int, ...]) -> np.ndarray:
    return _tree_normal(seeds, BROWNIAN + ((cell + (1 << 20)) << 16) + node, shape)


@lru_cache(maxsize=32)
def _tree_normal(seeds: tuple[int, ...], stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """A node's noise; the cache only saves the neighbouring step from drawing the shared nodes again."""
    return rows(quick_normal, seeds, stream, shape)
