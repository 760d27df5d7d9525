"""Successive halving (Jamieson & Talwalkar 2016) over ways to render, by a figure of held-out pictures.

Every candidate is rendered with few captions; the better third goes on with more, from the same captions and noise. So
candidates are compared as pairs: what one caption or one draw of noise does to all of them cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from latentgen.evaluation.metrics import redrawn, unit

ROUNDS = 200
KEPT = 3  # one in three goes on
C = TypeVar("C")


class Score(Protocol):
    """Lower is better. features (n, D) of captions 0 to n − 1; draws (R, n), how often each row counts -> (R,)."""

    def __call__(self, features: np.ndarray, draws: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Rated(Generic[C]):
    """value in [low, high] with 95% over captions; behind: what it lies behind the best of its round, and its interval.

    The candidates of the last round have the most pictures; the others were left where they stand.
    """

    candidate: C
    pictures: int
    value: float
    low: float
    high: float
    behind: tuple[float, float, float]

    @property
    def told_apart(self) -> bool:
        """Whether it is worse than the best of its round by more than the noise."""
        return self.behind[1] > 0


def halve(
    candidates: Sequence[C],
    look: Callable[[C, int], np.ndarray],
    score: Score,
    pictures: Sequence[int],
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> list[Rated[C]]:
    """All candidates, the best of the last round first, each as it was rated last.

    look(candidate, n) -> features (n, D). pictures: how many captions in each round, rising.
    """
    left, done, keep = list(candidates), list[Rated[C]](), 0
    for turn, count in enumerate(pictures):
        report(f"round {turn + 1} of {len(pictures)}: {len(left)} candidates, {count} pictures each")
        rated = rate(left, [look(each, count) for each in left], score, count, seed)
        keep = len(rated) if turn == len(pictures) - 1 else max(2, -(-len(rated) // KEPT))
        done = [*rated[keep:], *done]
        left = [each.candidate for each in rated[:keep]]
    return [*rated[:keep], *done]


def rate(
    candidates: Sequence[C], features: Sequence[np.ndarray], score: Score, count: int, seed: int = 0
) -> list[Rated[C]]:
    """Best first. The same bootstrap draws for all, so differences have intervals of their own."""
    random = np.random.default_rng(seed)
    draws = np.stack([np.ones(count), *(redrawn(random, count) for _ in range(ROUNDS))])
    table = np.stack([score(each, draws) for each in features])  # (candidates, 1 + R); the first is of all rows
    values, boots = table[:, 0], table[:, 1:]
    best = int(values.argmin())
    rated = []
    for k in np.argsort(values, kind="stable"):
        low, high = values[k] + _ends(boots[k])
        gap, apart = float(values[k] - values[best]), _ends(boots[k] - boots[best])
        behind = (gap, gap + float(apart[0]), gap + float(apart[1]))
        rated.append(Rated(candidates[k], count, float(values[k]), float(low), float(high), behind))
    return rated


def _ends(boots: np.ndarray) -> np.ndarray:
    """Of 95%, about 0."""
    return np.asarray(np.quantile(boots - boots.mean(), (0.025, 0.975)))


@dataclass(frozen=True)
class KernelDistance:
    """KID (Bińkowski et al. 2018) of renderings to all held-out pictures (M, D), which stay as they are."""

    real: np.ndarray

    def __call__(self, features: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Unbiased in the renderings: a row drawn twice is no pair of its own."""
        x, y = features.astype(np.float64), self.real.astype(np.float64)
        width = x.shape[1]
        within = (x @ x.T / width + 1) ** 3
        across = ((x @ y.T / width + 1) ** 3).mean(1)
        among = (y @ y.T / width + 1) ** 3
        rest = (among.sum() - np.trace(among)) / (len(y) * (len(y) - 1))
        total, squares = draws.sum(1), (draws * draws).sum(1)
        pairs = np.einsum("rn,nm,rm->r", draws, within, draws, optimize=True) - (draws * draws) @ np.diag(within)
        return np.asarray(pairs / (total**2 - squares) + rest - 2 * draws @ across / total)


@dataclass(frozen=True)
class Unlikeness:
    """1 − cosine of each rendering with the real picture of its own caption; own (N, D), row k caption k's."""

    own: np.ndarray

    def __call__(self, features: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The mean over the rows drawn."""
        away = 1 - (unit(features) * unit(self.own[: len(features)])).sum(1)
        return np.asarray(draws @ away / draws.sum(1))


FIGURES: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "kid": ("KID to the held-out pictures", KernelDistance),
    "unlikeness": ("1 − likeness to the caption's own held-out picture", Unlikeness),
}
