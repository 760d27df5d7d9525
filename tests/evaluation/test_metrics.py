"""Figures against what is known without them: closed forms, planted answers, and samples of one distribution."""

import numpy as np
import pytest

from latentgen.errors import InputError
from latentgen.evaluation import metrics


def normal(seed: int, rows: int, width: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal((rows, width))


def test_the_frechet_distance_is_that_of_matrix_square_roots() -> None:
    from scipy.linalg import sqrtm

    x, y = normal(0, 300, 8), normal(1, 200, 8, 0.5, 2.0) @ normal(2, 8, 8)
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert metrics.frechet(x, y) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    x, y = normal(0, 5000, 4), normal(1, 5000, 4, mean=1.0, spread=2.0)
    assert metrics.frechet(x, y) == pytest.approx(4 * (1 + 1), rel=0.05)


def test_a_sample_is_at_no_frechet_distance_from_itself_with_fewer_pictures_than_features() -> None:
    x = normal(0, 20, 64)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-8)


def test_rows_that_count_twice_are_rows_given_twice() -> None:
    x, y = normal(0, 12, 5), normal(1, 9, 5)
    counts = np.array([2, 1, 0] * 4, dtype=float)
    assert metrics.frechet(x, y, counts) == pytest.approx(metrics.frechet(np.repeat(x, counts.astype(int), 0), y))


def test_the_kernel_distance_of_one_distribution_is_unbiased_about_zero_and_its_interval_covers_zero() -> None:
    found = [metrics.kid_figure(normal(2 * k, 60, 16), normal(2 * k + 1, 60, 16)) for k in range(20)]
    values = np.array([figure.value for figure in found])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert (values < 0).any()
    assert np.mean([figure.low <= 0 <= figure.high for figure in found]) >= 0.8


def test_the_kernel_distance_sees_a_shift() -> None:
    assert metrics.kid_figure(normal(0, 60, 16), normal(1, 60, 16, mean=1.0)).low > 0
    assert metrics.cmmd_figure(normal(0, 60, 16, 1.0), normal(1, 60, 16, mean=-1.0)).low > 0


def test_real_against_real_is_precise_and_whole_and_far_off_is_neither() -> None:
    real, other = normal(0, 300, 4), normal(1, 300, 4)
    alike, off = metrics.manifold_figures(real, other), metrics.manifold_figures(real, other + 50)
    assert min(alike["precision"].value, alike["recall"].value, alike["coverage"].value) > 0.85
    assert alike["density"].value == pytest.approx(1, abs=0.15)
    assert max(figure.value for figure in off.values()) == 0


def test_one_mode_alone_is_precise_but_recalls_little() -> None:
    real = np.concatenate([normal(0, 100, 4), normal(1, 100, 4, mean=20)])
    found = metrics.manifold_figures(real, normal(2, 200, 4))
    assert found["precision"].value > 0.8
    assert found["recall"].value < 0.6


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    covered = []
    for seed in range(200):
        figure = metrics.mean_figure(np.random.default_rng(seed).random(80), seed)
        covered.append(figure.low <= 0.5 <= figure.high)
    assert 0.89 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("figure", ["mean", "ratio"])
def test_an_interval_is_as_wide_as_95_percent_are(figure: str) -> None:
    rows = np.random.default_rng(0).normal(10, 1, 2000)
    found = metrics.mean_figure(rows) if figure == "mean" else metrics.ratio_figure(rows, np.ones(2000))
    assert found.high - found.low == pytest.approx(2 * 1.96 * rows.std() / 2000**0.5, rel=0.12)


def test_a_ratio_of_rows_to_themselves_is_certain() -> None:
    rows = np.random.default_rng(0).random(50)
    found = metrics.ratio_figure(rows, rows)
    assert found.low == found.high == found.value == 1


def test_shuffled_captions_drop_to_chance() -> None:
    texts = normal(0, 400, 32)
    pictures = texts + 0.3 * normal(1, 400, 32)
    shuffled = texts[np.random.default_rng(2).permutation(400)]
    assert metrics.retrieval_rows(pictures, texts).mean() > 0.95
    assert metrics.retrieval_rows(pictures, shuffled).mean() < 0.02
    assert metrics.score_rows(pictures, texts).mean() > 90
    assert metrics.score_rows(pictures, shuffled).mean() < 15


def test_an_equal_caption_is_a_right_answer() -> None:
    texts = np.eye(3)[[0, 0, 1]]
    assert metrics.retrieval_rows(texts, texts, ["a", "a", "b"]).tolist() == [1, 1, 1]


def test_the_same_picture_has_full_similarity_and_a_known_error_its_decibels() -> None:
    x = np.random.default_rng(0).integers(0, 240, (2, 32, 32, 3)).astype(np.uint8)
    assert metrics.ssim_rows(x, x) == pytest.approx(1)
    assert metrics.psnr_rows(x, x + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert metrics.psnr_rows(x, x).tolist() == [100, 100]
    assert (metrics.ssim_rows(x, 255 - x) < 0).all()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_intervals_of_few_pictures_are_numbers(count: int) -> None:
    x, y = normal(0, count, 16), normal(1, count, 16)
    for figure in (metrics.kid_figure(x, y), metrics.cmmd_figure(x, y), metrics.frechet_figure(x, y)):
        assert figure.low <= figure.value <= figure.high and np.isfinite([figure.low, figure.high]).all()


def test_a_share_of_little_has_ends_that_are_numbers_and_of_nothing_there_is_none() -> None:
    above, below = np.array([1, 0, 1, 0, 0, 1.0]), np.array([1, 0, 0, 0, 0, 0.0])
    found = metrics.ratio_figure(above, below)
    assert found.value == 3 and 0 <= found.low <= 3 <= found.high <= 6
    with pytest.raises(InputError, match="something below"):
        metrics.ratio_figure(above, 0 * below)


def test_too_few_pictures_are_one_line() -> None:
    for call in (
        lambda: metrics.frechet(np.ones((1, 2)), np.ones((3, 2))),
        lambda: metrics.kid_figure(np.ones((1, 2)), np.ones((3, 2))),
        lambda: metrics.mean_figure(np.array([])),
        lambda: metrics.manifold_figures(np.ones((2, 2)), np.ones((2, 2))),
        lambda: metrics.ssim_rows(np.ones((1, 8, 8, 3)), np.ones((1, 8, 8, 3))),
    ):
        with pytest.raises(InputError):
            call()
