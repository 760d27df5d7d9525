"""Noise from counters: a pure function of (seed, stream), the same on every device and at every batch size.

Philox 4x64 (Salmon et al. 2011) keyed by (seed, stream); stream 0 is the initial noise, stream 1 + i the noise of
step i. Picture k of a batch draws from its own seed alone, so it is the picture of that seed rendered by itself.
"""

import math
import threading
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

LATTICE, SHIFT = 40503, 32761  # odd and nearest to 2^16 over the golden ratio; the best of 150 shifts


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
    """Standard normal float32 of the given shape, in a third of the time of `normal`: 16 of the counter's bits a pair.

    Two numbers that lie side by side are one of the 2^16 pairs of `pairs`; the largest is 4.3 standard deviations. For
    the noise of steps and paths, of which there is much.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    words = _raw(seed, stream, -(-half // 4)).view("<u2")[:half]
    return pairs().take(words, mode="wrap").view(np.float32)[:count].reshape(shape)


class _Counter(threading.local):
    """A thread's own Philox, keyed anew for every draw: a third of what a new one costs, which asks for entropy."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)


_COUNTER, _WORD, _ZEROS = _Counter(), np.dtype("<u8"), (0, 0, 0, 0)


def _raw(seed: int, stream: int, count: int) -> np.ndarray:
    """The first `count` words of Philox keyed by (seed, stream): uint64, little-endian."""
    philox = _COUNTER.philox
    state: Any = {  # numbers, not arrays: they are read one by one
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": (seed, stream)},
        "buffer": _ZEROS,
        "buffer_pos": 4,  # used up
        "has_uint32": 0,
        "uinteger": 0,
    }
    philox.state = state
    return np.asarray(philox.random_raw(count), dtype=_WORD)


@lru_cache(maxsize=1)
def pairs() -> np.ndarray:
    """2^16 pairs of normal numbers, evenly spread in two dimensions: float32 (65536, 2), each pair seen as one uint64.

    Each number of a pair runs through the normal quantiles at the midpoints of 2^16 equal parts, of variance 1; which
    go together is told by a shifted rank-1 lattice (Korobov 1959) of golden ratio. Mixed moments of Hermite
    polynomials up to the sixth, which are 0 for independent numbers, are below 0.002 (0.01 for pairs drawn by lot).
    """
    inverse = NormalDist().inv_cdf  # Wichura 1988, AS 241
    half = np.array([inverse((k + 0.5) / 65536) for k in range(32768)])
    quantiles = np.concatenate([half, -half[::-1]]) / np.sqrt(np.mean(half**2))
    other = (np.arange(65536) * LATTICE + SHIFT) % 65536
    return np.stack([quantiles, quantiles[other]], 1).astype(np.float32).view(np.uint64).ravel()


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
    same picture. The path is a Brownian tree from W(0) = 0 out to ±END: the middle of a cell is the bridge between its
    ends and the cell's own normal number, drawn from its own counter, and halves of cells are cells. A cell that holds
    one level of the walk is not halved: its number makes the bridge at that level, which is exact, and near what more
    levels would find there. A level of no walk is put at the nearest multiple of 2**−UNTOLD.
    """

    END, DEPTH, UNTOLD = 64, 40, 8  # cells are at least 2**−DEPTH wide
    _walk: dict[float, tuple[int, int]]
    _at: Callable[[int, tuple[int, ...]], Any]
    _level: Callable[[float, tuple[int, ...]], Any]

    def __init__(self, seeds: Sequence[int], levels: Sequence[float] = ()) -> None:
        super().__init__(seeds)
        object.__setattr__(self, "_walk", cells(levels, self.END << self.DEPTH, 1 << self.DEPTH))
        # the caches save the next steps from drawing what they share; they go when the walk does
        object.__setattr__(self, "_at", lru_cache(maxsize=20)(self._drawn_at))
        object.__setattr__(self, "_level", lru_cache(maxsize=3)(self._drawn_level))

    def step(self, index: int, like_: Array, span: tuple[float, float] | None = None) -> Array:
        """(W(next) − W(now))/sqrt(next − now) for the `span` walked: standard normal, like `like_` (B, …)."""
        if span is None or not -self.END <= span[0] < span[1] <= self.END:
            raise InputError("a Brownian path needs the span of logSNR that the step walks")
        if like_.shape[0] != len(self.seeds):
            raise InputError(f"a batch of {like_.shape[0]} rows needs as many seeds, not {len(self.seeds)}")
        shape = tuple(like_.shape[1:])
        now, after = span
        if not (now in self._walk and after in self._walk):
            now, after = (round(level * 2**self.UNTOLD) / 2**self.UNTOLD for level in span)
            after = max(after, now + 2.0**-self.UNTOLD)
        total = self._level(after, shape) - self._level(now, shape)
        total *= np.float32(1 / math.sqrt(after - now))
        return like(total, like_)

    def _drawn_level(self, level: float, shape: tuple[int, ...]) -> Any:
        """W at a level (B, *shape) float32: the bridge over its cell."""
        unit = 1 << self.DEPTH
        low, high = self._walk.get(level) or (round(level * unit),) * 2
        if low == high:
            return self._at(low, shape)
        width, start = (high - low) / unit, self._at(low, shape)
        share = (level - low / unit) / width
        bridge = self._normal((low + high) // 2, shape)  # an array of its own, so all is done in its place
        bridge *= np.float32(math.sqrt((1 - share) / share * width))
        bridge += self._at(high, shape)
        bridge -= start
        bridge *= np.float32(share)
        bridge += start
        return bridge

    def _drawn_at(self, place: int, shape: tuple[int, ...]) -> Any:
        """W at a place of the tree, in units of 2**−DEPTH: (B, *shape) float32, or the number 0."""
        if place == 0:
            return np.float32(0)
        fresh = self._normal(place, shape)
        if abs(place) == self.END << self.DEPTH:
            fresh *= np.float32(math.sqrt(self.END))
            return fresh
        half = place & -place  # of the cell whose middle this is
        fresh *= np.float32(math.sqrt(2 * half / (1 << self.DEPTH)))
        fresh += self._at(place - half, shape)
        fresh += self._at(place + half, shape)
        fresh *= np.float32(0.5)
        return fresh

    def _normal(self, middle: int, shape: tuple[int, ...]) -> np.ndarray:
        """The normal numbers of the cell with this middle."""
        return rows(quick_normal, self.seeds, BROWNIAN + (self.END << self.DEPTH) + middle, shape)


def cells(levels: Sequence[float], end: int, unit: int) -> dict[float, tuple[int, int]]:
    """For each level, as a multiple of 1/unit, the largest cell of the tree over ±end that holds no other level.

    Cells are (low, high), halved from (−end, 0) and (0, end); a level on a middle that was needed is (middle, middle),
    and so are levels that one smallest cell holds together.
    """
    found = dict.fromkeys(levels, (0, 0))
    waiting = [
        (-end, 0, [level for level in levels if level < 0]),
        (0, end, [level for level in levels if level > 0]),
    ]
    while waiting:
        low, high, held = waiting.pop()
        if high - low == 1 or len(held) == 1:
            found |= {level: (low, high if len(held) == 1 else low) for level in held}
        elif held:
            middle = (low + high) // 2
            found |= {level: (middle, middle) for level in held if level * unit == middle}
            waiting.append((low, middle, [level for level in held if level * unit < middle]))
            waiting.append((middle, high, [level for level in held if level * unit > middle]))
    return found
