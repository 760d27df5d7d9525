"""Averages made after training against the average that would have been kept during it, and against closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from latentgen import InputError
from latentgen.training.averages import LARGEST, combination, decay_at, gamma_of, store, stored, synthesise


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_paper(width: float, gamma: float) -> None:
    assert gamma_of(width) == pytest.approx(gamma, abs=5e-3)  # Karras et al. 2024, section 3.1


@pytest.mark.parametrize("width", [0.01, 0.05, 0.13, 0.28, LARGEST])
def test_the_width_is_the_deviation_of_the_response(width: float) -> None:
    gamma = gamma_of(width)
    mean, square = (quad(lambda s, k=k: s**k * (gamma + 1) * s**gamma, 0, 1)[0] for k in (1, 2))
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3])
def test_widths_that_do_not_exist_are_refused(width: float) -> None:
    with pytest.raises(InputError, match=r"at most 0\.288"):
        gamma_of(width)


def walk(steps: int) -> torch.Tensor:
    """A trajectory of four weights: drift, and noise as training has."""
    generator = torch.Generator().manual_seed(3)
    return torch.cumsum(torch.randn(steps, 4, generator=generator, dtype=torch.float64) * 0.1 + 0.02, 0)


def averaged(path: torch.Tensor, width: float) -> torch.Tensor:
    """The average a run keeps: step by step."""
    gamma, average = gamma_of(width), torch.zeros(4, dtype=torch.float64)
    for step, weights in enumerate(path, start=1):
        average = torch.lerp(weights, average, decay_at(step, gamma))
    return average


@pytest.mark.parametrize("width", [0.05, 0.07, 0.10, 0.15, 0.22])
def test_an_average_made_afterwards_is_the_one_that_would_have_been_kept(tmp_path: Path, width: float) -> None:
    steps, path = 2048, walk(2048)
    for step in range(128, steps + 1, 128):
        store(tmp_path, step, {w: {"w": averaged(path[:step], w).float()} for w in (0.05, 0.10)})
    expected = averaged(path, width)
    found = synthesise(stored(tmp_path), steps, width)["w"].double()
    moved = (path[-1] - expected).abs().max()  # what ignoring the width would be wrong by
    assert float((found - expected).abs().max()) < 0.05 * float(moved)


def test_a_kept_average_is_itself() -> None:
    kept = [(step, width) for step in (500, 1000) for width in (0.05, 0.1)]
    np.testing.assert_allclose(combination(kept, 1000, 0.1), [0, 0, 0, 1], atol=1e-6)


def test_without_kept_averages_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no averages were kept"):
        synthesise(stored(tmp_path), 10, 0.1)


def test_numbers_beyond_half_precision_are_kept_and_those_that_are_not_finite_refused(tmp_path: Path) -> None:
    store(tmp_path, 10, {0.1: {"large": torch.tensor([1e5, -3.0]), "small": torch.tensor([0.5])}})
    found = synthesise(stored(tmp_path), 10, 0.1)
    assert found["large"].tolist() == [1e5, -3.0] and found["small"].tolist() == [0.5]
    with pytest.raises(InputError, match="the average of large is not finite at step 11"):
        store(tmp_path, 11, {0.1: {"large": torch.tensor([float("inf")])}})
    assert [path.name for path in tmp_path.iterdir()] == ["average-00000010"]
