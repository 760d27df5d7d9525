"""Noise from counters: a pure function of (seed, stream), the same on every device and at every batch size.

Philox 4x64 (Salmon et al. 2011) keyed by (seed, stream); stream 0 is the initial noise, stream 1 + i the noise of
step i. Picture k of a batch draws from its own seed alone, so it is the picture of that seed rendered by itself.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

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
    from statistics import NormalDist

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

    def brownian(self, levels: Sequence[float]) -> "Noise":
        """The Brownian path of the same seeds, for samplers that follow one path however many steps they take.

        levels: the logSNR levels the walk will ask for, and no others; a step then takes about two draws.
        """
        return Brownian(self.seeds, levels)


class Cell(NamedTuple):
    """A stretch of the path: parted in two where the walk has a level in it, a leaf where it has none.

    parent: its index in the list of cells, −1 for the two outermost; side: 0 for the parent's left part, 1 for the
    right one. low, high, split (None for a leaf) are levels in units of 2**−DEPTH; number, the counter of the normal
    numbers that part it.
    """

    parent: int
    side: int
    low: int
    high: int
    split: int | None
    number: int


class Brownian(Noise):
    """Noise as the normalised increments of one Brownian path a picture, its clock being logSNR.

    The reverse SDE's noise over a short step is sigma·dW with W's clock logSNR, so a run of more steps refines the
    same picture. The path is a tree of bridges (Lévy 1948) from W(0) = 0 out to ±END: a cell's counter gives the normal
    numbers by which its increment is shared out between two parts. Cells are halved, the same in every walk, until one
    holds a single level of the walk, and parted there: exact, and near what more levels would find. Levels are met to
    2**−DEPTH.
    """

    END, DEPTH = 64, 40
    _cells: list[Cell]
    _leaves: list[int]  # indices of the cells without parts, from left to right
    _first: dict[int, int]  # a leaf's low end -> its place among them
    _open: list[tuple[int, tuple[Any, Any]]]  # the cells above the last leaf, and the increments of their parts
    _last: tuple[int, int, Any]  # the last stretch of leaves that was asked for, and its increment

    def __init__(self, seeds: Sequence[int], levels: Sequence[float]) -> None:
        super().__init__(seeds)
        if not all(-self.END < level < self.END for level in levels):
            raise InputError(f"levels of a Brownian path are logSNRs between −{self.END} and {self.END}")
        cells = parted(sorted({self._place(level) for level in levels}), self.END << self.DEPTH)
        leaves = sorted((cell.low, index) for index, cell in enumerate(cells) if cell.split is None)
        object.__setattr__(self, "_cells", cells)
        object.__setattr__(self, "_leaves", [index for _, index in leaves])
        object.__setattr__(self, "_first", {low: place for place, (low, _) in enumerate(leaves)})
        object.__setattr__(self, "_open", [])
        object.__setattr__(self, "_last", (-1, -1, None))

    def step(self, index: int, like_: Array, span: tuple[float, float] | None = None) -> Array:
        """(W(next) − W(now))/sqrt(next − now) for the `span` walked: standard normal, like `like_` (B, …).

        Raises InputError for a span whose ends are not levels of the walk.
        """
        if like_.shape[0] != len(self.seeds):
            raise InputError(f"a batch of {like_.shape[0]} rows needs as many seeds, not {len(self.seeds)}")
        now, after = (0, 0) if span is None else (self._first.get(self._place(level), -1) for level in span)
        if span is None or not (span[0] < span[1] and 0 <= now <= after):
            raise InputError("a Brownian path needs the span of logSNR that the step walks, of levels it was told")
        total = self._walked(now, after, tuple(like_.shape[1:]))
        return like(total * np.float32(1 / math.sqrt(span[1] - span[0])), like_)

    def _walked(self, now: int, after: int, shape: tuple[int, ...]) -> Any:
        """W's increment over the leaves from `now` to before `after`: (B, *shape) float32, not to be written to.

        The last one is kept: a second-order step asks for the way to its middle, then for the whole of its way.
        """
        start, end, total = self._last
        if start != now or end > after or total.shape[1:] != shape:
            end, total = now, None
        for leaf in self._leaves[end:after]:
            more = self._increment(leaf, shape)
            total = more if total is None else total + more
        if total is None:
            total = np.zeros((len(self), *shape), np.float32)
        object.__setattr__(self, "_last", (now, after, total))
        return total

    def _place(self, level: float) -> int:
        """A level in units of 2**−DEPTH."""
        return round(level * (1 << self.DEPTH))

    def _increment(self, index: int, shape: tuple[int, ...]) -> Any:
        """W(high) − W(low) of a cell: (B, *shape) float32, not to be written to."""
        cell = self._cells[index]
        if cell.parent >= 0:
            return self._parts(cell.parent, shape)[cell.side]
        self._open.clear()
        whole = self._normal(cell.low or cell.high, shape)
        whole *= np.float32(math.sqrt(self.END))
        return whole

    def _parts(self, index: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """The increments of a cell's two parts. They are kept while the walk is inside the cell, so that none is drawn
        twice on the way."""
        for depth, (kept, parts) in enumerate(self._open):
            if kept == index and parts[0].shape[1:] == shape:
                del self._open[depth + 1 :]
                return parts
        cell = self._cells[index]
        assert cell.split is not None
        whole = self._increment(index, shape)
        before, after = cell.split - cell.low, cell.high - cell.split
        share = before / (before + after)
        left = self._normal(cell.number, shape)
        left *= np.float32(math.sqrt(share * after / (1 << self.DEPTH)))
        right = np.float32(share) * whole
        left += right
        parts = left, np.subtract(whole, left, out=right)
        self._open.append((index, parts))
        return parts

    def _normal(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """The normal numbers of a counter."""
        return rows(quick_normal, self.seeds, BROWNIAN + (self.END << self.DEPTH) + number, shape)


def parted(levels: Sequence[int], end: int) -> list[Cell]:
    """The cells over (−end, 0) and (0, end), parted until no level lies inside one; parents come before their parts."""
    found: list[Cell] = []
    waiting = [
        (-1, 0, -end, 0, [level for level in levels if level < 0]),
        (-1, 1, 0, end, [level for level in levels if level > 0]),
    ]
    while waiting:
        parent, side, low, high, held = waiting.pop()
        middle, split = (low + high) // 2, None
        if held:
            split = held[0] if len(held) == 1 else middle
            below, above = [level for level in held if level < split], [level for level in held if level > split]
            waiting.append((len(found), 0, low, split, below))
            waiting.append((len(found), 1, split, high, above))
        found.append(Cell(parent, side, low, high, split, middle))
    return found
