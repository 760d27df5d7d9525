"""Noise from counters: a pure function of (seed, stream), the same on every device and at every batch size.

Philox 4x64 (Salmon et al. 2011) keyed by (seed, stream); stream 0 is the initial noise, stream 1 + i the noise of
step i. Picture k of a batch draws from its own seed alone, so it is the picture of that seed rendered by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentgen.diffusion.array import Array, like
from latentgen.errors import InputError

INITIAL = 0  # the stream of the first noise; step i draws from stream 1 + i
BROWNIAN = 1 << 63  # streams from here on belong to Brownian paths


def normal(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of the given shape: always the same for the same (seed, stream, shape)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32)


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
        return np.stack([normal(seed, stream, shape) for seed in self.seeds])

    def initial(self, shape: tuple[int, ...]) -> np.ndarray:
        """The noise a picture starts from: float32 (B, *shape); `shape` is without the batch."""
        return self.draw(INITIAL, tuple(shape))

    def step(self, index: int, like_: Array) -> Array:
        """Fresh noise for step `index` (from 0), of the shape, library, dtype and device of `like_` (B, …)."""
        if like_.shape[0] != len(self.seeds):
            raise InputError(f"a batch of {like_.shape[0]} rows needs as many seeds, not {len(self.seeds)}")
        return like(self.draw(1 + index, tuple(like_.shape[1:])), like_)
