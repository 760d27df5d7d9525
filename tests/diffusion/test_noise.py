"""The quick noise of steps and paths: as good as independent normal numbers."""

import math

import numpy as np
from numpy.polynomial.hermite_e import hermeval
from scipy import stats

from latentgen.diffusion import noise
from latentgen.diffusion.noise import Noise


def test_the_pairs_of_numbers_are_as_good_as_independent() -> None:
    pairs = noise.pairs().view(np.float32).reshape(65536, 2).astype(np.float64)
    orders = range(1, 7)
    one, other = (
        np.stack([hermeval(column, [0] * n + [1]) / math.sqrt(math.factorial(n)) for n in orders]) for column in pairs.T
    )
    assert np.abs(one @ other.T / 65536).max() < 0.002  # E[He_i(x) He_j(y)] is 0 for every i, j >= 1
    assert stats.kstest(pairs[:, 0], "norm").pvalue > 0.999 and np.array_equal(np.sort(pairs[:, 1]), pairs[:, 0])


def test_neighbours_of_a_step_s_noise_fall_evenly_into_the_plane() -> None:
    drawn = Noise([11]).step(0, np.zeros((1, 4, 256, 256), np.float32)).reshape(-1, 2)
    cells = np.floor(stats.norm.cdf(drawn) * 16).astype(int)
    counts = np.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256)
    assert 0.001 < stats.chisquare(counts).pvalue < 0.999
    assert np.abs(np.corrcoef(drawn[:-1, 1], drawn[1:, 0])[0, 1]) < 4 / math.sqrt(len(drawn))  # of two pairs
