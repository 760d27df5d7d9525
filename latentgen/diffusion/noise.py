"""Noise from counters: a pure function of (seed, stream), the same on every device and at every batch size.

Philox 4x64 (Salmon et al. 2011) keyed by (seed, stream); stream 0 is the initial noise, stream 1 + i the noise of
step i. Picture k of a batch draws from its own seed alone, so it is the picture of that seed rendered by itself.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
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
    words = _raw(seed, stream, pairs).view("<u4").astype(np.float32)
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
    words = _raw(seed, stream, -(-count // 4)).view("<u2")[:count]
    return quantiles().take(words, mode="wrap").reshape(shape)


class _Counter(threading.local):
    """A thread's own Philox, keyed anew for every draw: a third of what a new one costs, which asks for entropy."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)


_COUNTER, _WORD, _ZEROS = _Counter(), np.dtype("<u8"), (0, 0, 0, 0)


def _raw(seed: int, stream: int, count: int) -> np.ndarray:
    """The first `count` words of Philox keyed by (seed, stream): uint64, little-endian."""
    philox = _COUNTER.philox
    philox.state = {  # numbers, not arrays: they are read one by one
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": (seed, stream)},
        "buffer": _ZEROS,
        "buffer_pos": 4,  # used up
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.asarray(philox.random_raw(count), dtype=_WORD)


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

    def brownian(self, levels: Sequence[float] = ()) -> "Noise":
        """The Brownian path of the same seeds, for samplers that follow one path however many steps they take.

        levels: the rising logSNR levels the walk will ask for; the path then costs about two draws a step.
        """
        return Brownian(self.seeds, levels)


class Brownian(Noise):
    """Noise as the normalised increments of one Brownian path a picture, its clock being logSNR.

    The reverse SDE's noise over a short step is sigma·dW with W's clock logSNR, so a run of more steps refines the
    same picture. The path is a Brownian tree from W(0) = 0 out to ±END: W at a place of the grid 2**−DEPTH is the
    bridge between its two neighbours of the next coarser grid, every place with its own counter, and so a function of
    (seed, place) alone. What a place costs is how fine its grid is: each level of the walk is therefore put at the
    coarsest place within an eighth of the steps beside it, and a level of no walk at the nearest of 2**−UNTOLD.
    """

    END, DEPTH, UNTOLD = 64, 20, 8
    _at: Callable[[int, tuple[int, ...]], Any]
    _places: dict[float, int]

    def __init__(self, seeds: Sequence[int], levels: Sequence[float] = ()) -> None:
        super().__init__(seeds)
        object.__setattr__(self, "_places", dict(zip(levels, coarse_places(levels, self.DEPTH), strict=True)))
        # the cache saves the neighbouring steps from drawing what they share; it goes when the walk does
        object.__setattr__(self, "_at", lru_cache(maxsize=20)(self._drawn_at))

    def step(self, index: int, like_: Array, span: tuple[float, float] | None = None) -> Array:
        """(W(next) − W(now))/sqrt(next − now) for the `span` walked: standard normal, like `like_` (B, …)."""
        if span is None or not -self.END <= span[0] < span[1] <= self.END:
            raise InputError("a Brownian path needs the span of logSNR that the step walks")
        if like_.shape[0] != len(self.seeds):
            raise InputError(f"a batch of {like_.shape[0]} rows needs as many seeds, not {len(self.seeds)}")
        now, shape = self._place(span[0]), tuple(like_.shape[1:])
        after = max(self._place(span[1]), now + 1)
        total = self._at(after, shape) - self._at(now, shape)
        total *= np.float32(math.sqrt((1 << self.DEPTH) / (after - now)))
        return like(total, like_)

    def _place(self, level: float) -> int:
        """Where on the finest grid a level lies."""
        place = self._places.get(level)
        return round(level * (1 << self.UNTOLD)) << (self.DEPTH - self.UNTOLD) if place is None else place

    def _drawn_at(self, place: int, shape: tuple[int, ...]) -> Any:
        """W at a place, (B, *shape) float32, or the number 0."""
        if place == 0:
            return np.float32(0)
        end, width = self.END << self.DEPTH, place & -place  # of the coarsest grid the place is on
        fresh = rows(quick_normal, self.seeds, BROWNIAN + place + end, shape)
        if abs(place) == end:
            return fresh * np.float32(math.sqrt(self.END))
        fresh *= np.float32(math.sqrt(width / (2 << self.DEPTH)))  # of the middle of a bridge over 2·width
        middle = self._at(place - width, shape) + self._at(place + width, shape)
        middle *= np.float32(0.5)
        middle += fresh
        return middle


def coarse_places(levels: Sequence[float], depth: int) -> list[int]:
    """For each of the rising levels the coarsest place, in units of 2**−depth, within an eighth of the steps beside it.

    They rise as the levels do. The coarsest whole number in [low, high] has the most trailing zeros: it keeps the bits
    in which low − 1 and high agree, and the highest in which they do not.
    """
    unit, places = 1 << depth, list[int]()
    gaps = [after - before for before, after in pairwise(levels)] or [0.0]
    for level, before, after in zip(levels, [gaps[0], *gaps], [*gaps, gaps[-1]], strict=False):
        low, high = math.ceil(unit * (level - 0.125 * before)), math.floor(unit * (level + 0.125 * after))
        if high < low:
            place = round(level * unit)
        elif low <= 0 <= high:
            place = 0
        else:
            shift = ((low - 1) ^ high).bit_length() - 1
            place = (high >> shift) << shift
        places.append(place if not places else max(place, places[-1] + 1))
    return places
