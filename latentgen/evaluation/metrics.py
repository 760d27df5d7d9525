"""Figures over features and pictures, each with its interval and the number of pictures behind it.

Intervals hold 95% of a bootstrap over pictures (Efron & Tibshirani 1993). Distances grow when a sample is drawn from a
sample, so their bootstrap is moved to lie around the estimate. Features are (N, D) arrays; sums are in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from latentgen.errors import InputError

ROUNDS = 200
DISTANCE_ROUNDS = 40  # of Fréchet distances, whose singular values take time
Weights = np.ndarray  # how often each row was drawn


@dataclass(frozen=True)
class Figure:
    """value in [low, high] with 95%, of `count` pictures."""

    value: float
    low: float
    high: float
    count: int


def mean_figure(rows: np.ndarray, seed: int = 0, scale: float = 1.0) -> Figure:
    """The mean of one number a picture, (N,), times scale. Raises InputError for none."""
    values = np.asarray(rows, np.float64) * scale
    if not len(values):
        raise InputError("a figure needs one picture at least")
    draws = np.random.default_rng(seed).integers(len(values), size=(ROUNDS, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return Figure(float(values.mean()), float(low), float(high), len(values))


def ratio_figure(above: np.ndarray, below: np.ndarray, seed: int = 0) -> Figure:
    """mean(above) / mean(below), paired rows (N,) drawn together. Raises InputError where nothing is below.

    Draws with nothing below have no ratio and are left out of the interval.
    """
    pairs = np.stack([above, below]).astype(np.float64)
    if not pairs[1].any():
        raise InputError("a ratio needs something below")
    draws = np.random.default_rng(seed).integers(pairs.shape[1], size=(ROUNDS, pairs.shape[1]))
    means = pairs[:, draws].mean(2)
    some = means[1] > 0
    low, high = np.quantile(means[0][some] / means[1][some], (0.025, 0.975))
    return Figure(float(pairs[0].mean() / pairs[1].mean()), float(low), float(high), pairs.shape[1])


def distance_figure(
    distance: Callable[[Weights, Weights], float], ours: int, theirs: int, rounds: int = ROUNDS, seed: int = 0
) -> Figure:
    """A distance of two samples; `distance` is given how often each row counts."""
    value = distance(np.ones(ours), np.ones(theirs))
    random = np.random.default_rng(seed)

    found = np.array([distance(redrawn(random, ours), redrawn(random, theirs)) for _ in range(rounds)])
    low, high = value + np.quantile(found - found.mean(), (0.025, 0.975))
    return Figure(float(value), float(low), float(high), ours)


def redrawn(random: np.random.Generator, count: int) -> Weights:
    """How often each of `count` rows, 2 or more, is in a bootstrap draw, (count,); of one row alone none is made.

    An unbiased distance is of pairs of different rows, and such a draw has none.
    """
    while True:
        weights = np.bincount(random.integers(count, size=count), minlength=count).astype(np.float64)
        if np.count_nonzero(weights) > 1:
            return weights


def frechet(x: np.ndarray, y: np.ndarray, wx: Weights | None = None, wy: Weights | None = None) -> float:
    """|m1 − m2|² + tr(C1 + C2 − 2(C1 C2)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    With C1 = AᵀA and C2 = BᵀB the square root's trace is the sum of the singular values of A Bᵀ, (N, M): exact, and
    no square root of a singular matrix is taken. Raises InputError for fewer than two pictures on a side.
    """
    (mean, a), (other, b) = _centred(x, wx), _centred(y, wy)
    # the triangle of a QR leaves AᵀA as it is, with no more rows than columns
    a, b = (np.asarray(np.linalg.qr(side, mode="r")) if len(side) > side.shape[1] else side for side in (a, b))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean - other) ** 2).sum() + (a * a).sum() + (b * b).sum() - 2 * overlap)


def _centred(x: np.ndarray, weights: Weights | None) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,), and rows A with AᵀA the covariance."""
    if len(x) < 2:
        raise InputError("a Fréchet distance needs two pictures or more on each side")
    x = x.astype(np.float64)
    w = np.ones(len(x)) if weights is None else weights
    x, w = x[w > 0], w[w > 0]
    mean = (w[:, None] * x).sum(0) / w.sum()
    return mean, np.sqrt(w / (w.sum() - 1))[:, None] * (x - mean)


def frechet_figure(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Figure:
    """`frechet` with its interval."""
    return distance_figure(lambda wx, wy: frechet(x, y, wx, wy), len(x), len(y), DISTANCE_ROUNDS, seed)


def kid_figure(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Figure:
    """Unbiased squared MMD under the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4); about 0, also below."""
    both = np.concatenate([x, y]).astype(np.float64)
    return _mmd_figure((both @ both.T / both.shape[1] + 1) ** 3, len(x), seed)


def cmmd_figure(x: np.ndarray, y: np.ndarray, seed: int = 0, width: float = 10.0) -> Figure:
    """1000 times the unbiased squared MMD, Gaussian kernel of width 10, unit CLIP features (Jayasumana et al. 2024)."""
    both = np.concatenate([x, y]).astype(np.float64)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    return _mmd_figure(1000 * np.exp((both @ both.T - 1) / width**2), len(x), seed)  # |x − y|² = 2 − 2 x·y


def _mmd_figure(kernel: np.ndarray, ours: int, seed: int) -> Figure:
    """Gretton et al. 2012, eq. 3; a row drawn twice is no pair of its own."""
    if ours < 2 or len(kernel) - ours < 2:
        raise InputError("a kernel distance needs two pictures or more on each side")
    own = np.diag(kernel)

    def within(block: np.ndarray, w: Weights, diagonal: np.ndarray) -> float:
        return float((w @ block @ w - (w * w) @ diagonal) / (w.sum() ** 2 - (w * w).sum()))

    def distance(wx: Weights, wy: Weights) -> float:
        first, second = within(kernel[:ours, :ours], wx, own[:ours]), within(kernel[ours:, ours:], wy, own[ours:])
        return first + second - 2 * float(wx @ kernel[:ours, ours:] @ wy / (wx.sum() * wy.sum()))

    return distance_figure(distance, ours, len(kernel) - ours, seed=seed)


def squared_distances(x: np.ndarray, y: np.ndarray, kind: type = np.float64) -> np.ndarray:
    """(N, M), not below 0, computed in `kind`."""
    x, y = x.astype(kind), y.astype(kind)
    return np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T, 0)


def manifold_figures(real: np.ndarray, ours: np.ndarray, near: int = 5, seed: int = 0) -> dict[str, Figure]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1 to 3, k = 3), density and coverage (Naeem et al. 2020).

    The intervals are over the pictures that are asked, the balls of the others as they are.
    """
    smaller = min(len(real), len(ours))
    if smaller < 3:
        raise InputError("precision and recall need three pictures or more on each side")
    cross = squared_distances(real, ours)  # (R, F)
    third = min(3, smaller - 1)
    fifth = min(near, len(real) - 1)
    inside = cross <= _radii(real, third)[:, None]
    balls = _radii(real, fifth)[:, None]
    rows = {
        "precision": inside.any(0),
        "recall": (cross <= _radii(ours, third)[None]).any(1),
        "density": (cross <= balls).sum(0) / fifth,
        "coverage": (cross <= balls).any(1),
    }
    return {name: mean_figure(values, seed) for name, values in rows.items()}


def _radii(x: np.ndarray, near: int) -> np.ndarray:
    """The squared distance of each row to its k-th neighbour, itself not counted: (N,)."""
    return np.partition(squared_distances(x, x), near, axis=1)[:, near]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.maximum(lengths, 1e-12))


def score_rows(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 · max(cos, 0) of each picture with its caption (Hessel et al. 2021, eq. 1 with w = 100): (N,)."""
    return np.asarray(100 * np.maximum((unit(pictures) * unit(texts)).sum(1), 0))


def retrieval_rows(queries: np.ndarray, keys: np.ndarray, names: list[str] | None = None) -> np.ndarray:
    """Whether row i of the queries finds row i of the keys first, or one of the same name: (N,) of 0 and 1."""
    found = (unit(queries) @ unit(keys).T).argmax(1)
    if names is None:
        return (found == np.arange(len(queries))).astype(np.float64)
    return np.array([float(names[key] == names[row]) for row, key in enumerate(found)])


def psnr_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Peak signal to noise, dB, of uint8 pictures (N, H, W, 3): (N,); 100 where they are the same."""
    error = ((x.astype(np.float64) - y) ** 2).mean((1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10)))


def ssim_rows(x: np.ndarray, y: np.ndarray, side: int = 11, spread: float = 1.5) -> np.ndarray:
    """Structural similarity (Wang et al. 2004, eq. 13), Gaussian window, on grey (Rec. 601), no padding: (N,)."""
    grey = np.array([0.299, 0.587, 0.114])
    a, b = x.astype(np.float64) @ grey, y.astype(np.float64) @ grey
    if min(a.shape[1:]) < side:
        raise InputError(f"SSIM needs pictures of {side} px or more")
    window = np.exp(-0.5 * ((np.arange(side) - side // 2) / spread) ** 2)
    window /= window.sum()

    def blur(z: np.ndarray) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(z, side, axis=1) @ window
        return np.asarray(np.lib.stride_tricks.sliding_window_view(rows, side, axis=2) @ window)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return np.asarray((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2)))
