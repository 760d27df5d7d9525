"""The quick noise of steps and paths: as good as independent normal numbers."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermeval
from scipy import stats

from latentgen.diffusion import noise
from latentgen.diffusion.noise import Noise, parted, quick_normal
from latentgen.errors import InputError


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


def test_brownian_increments_are_normal_independent_and_add_up() -> None:
    edges = [-3.75, -3.125, -0.25, -0.24609375, 2.0, 2.5]
    path, like = Noise([1, 2]).brownian(edges), np.zeros((2, 50_000), dtype=np.float32)
    pieces = [path.step(0, like, (a, b)) for a, b in pairwise(edges)]
    for piece in pieces:
        assert abs(float(piece.mean())) < 0.02 and abs(float(piece.std()) - 1) < 0.02
    assert np.all(np.abs(np.corrcoef([piece[0] for piece in pieces]) - np.eye(5)) < 0.03)
    total = sum(math.sqrt(b - a) * p for (a, b), p in zip(pairwise(edges), pieces, strict=True))
    whole = math.sqrt(edges[-1] - edges[0]) * path.step(9, like, (edges[0], edges[-1]))
    assert np.allclose(total, whole, atol=1e-4)
    for span in (None, (-3.75, 1.0), (2.0, -0.25)):
        with pytest.raises(InputError, match="span"):
            path.step(0, like, span)
    with pytest.raises(InputError, match="64"):
        Noise([1]).brownian([0.0, 64.0])


@given(levels=st.lists(st.floats(-40, 40), unique=True, min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_cells_of_a_brownian_path_meet_at_every_level_of_the_walk(levels: list[float]) -> None:
    places = sorted({round(level * (1 << 40)) for level in levels})
    end = 64 << 40
    cells = parted(places, end)
    leaves = sorted((cell.low, cell.high) for cell in cells if cell.split is None)
    assert [low for low, _ in leaves[1:]] == [high for _, high in leaves[:-1]]
    assert (leaves[0][0], leaves[-1][1]) == (-end, end)
    assert set(places) <= {low for low, _ in leaves}
    numbers = [cell.number for cell in cells if cell.split is not None]
    assert len(set(numbers)) == len(numbers)  # a counter for each draw
    for cell in cells:
        if cell.parent >= 0:
            above = cells[cell.parent]
            assert (cell.low, cell.high) == ((above.low, above.split), (above.split, above.high))[cell.side]


def test_a_walk_told_beforehand_has_normal_independent_increments_and_refines_a_coarser_one() -> None:
    generator, like = np.random.default_rng(0), np.zeros((1, 40_000), dtype=np.float32)
    fine = np.sort(generator.uniform(-7, 7, 60)).tolist()
    fine_path, coarse = Noise([5]).brownian(fine), fine[::6]
    coarse_path = Noise([5]).brownian(coarse)
    pieces = {span: fine_path.step(0, like, span)[0] for span in pairwise(fine)}
    table = np.corrcoef(list(pieces.values()))
    assert np.abs(table - np.eye(len(pieces))).max() < 0.025
    assert all(abs(float(piece.mean())) < 0.025 and abs(float(piece.std()) - 1) < 0.02 for piece in pieces.values())
    near = []
    for low, high in pairwise(coarse):
        refined = sum(math.sqrt(b - a) * piece for (a, b), piece in pieces.items() if low <= a and b <= high)
        near.append(np.corrcoef(refined, coarse_path.step(0, like, (low, high))[0])[0, 1])
    assert min(near) > 0.7 and np.mean(near) > 0.85  # the same picture: independent noise would give 0
    again = Noise([5]).brownian(fine)
    backwards = {span: again.step(0, like, span)[0] for span in reversed(list(pairwise(fine)))}
    assert all(np.array_equal(piece, backwards[span]) for span, piece in pieces.items())  # a function, no stream


def test_a_step_by_its_middle_draws_nothing_twice_and_is_the_step_walked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, levels, like = [], [0.13 * k - 6 for k in range(60)], np.zeros((1, 64), dtype=np.float32)

    def counted(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        drawn.append(stream)
        return quick_normal(seed, stream, shape)

    monkeypatch.setattr(noise, "quick_normal", counted)
    path, at_once = (Noise([5]).brownian(levels) for _ in range(2))
    walked = []
    for now, middle, after in zip(levels[::2], levels[1::2], levels[2::2], strict=False):
        path.step(0, like, (now, middle))
        walked.append(path.step(0, like, (now, after)))
    assert len(drawn) == len(set(drawn)) >= len(levels)
    for (now, after), step in zip(pairwise(levels[::2]), walked, strict=True):
        np.testing.assert_array_equal(step, at_once.step(0, like, (now, after)))
