"""The nearest real pictures of a rendering: is it a copy, does it show the concept and style asked for?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentgen.evaluation.metrics import Figure, mean_figure, ratio_figure, squared_distances

AT_ONCE = 1024  # rows compared with all training pictures at a time
QUANTILE = 0.01
FIRST = 5  # neighbours in which a concept may be found


@dataclass(frozen=True)
class Copies:
    """Of each rendering the nearest training picture, its distance, and whether it is nearer than `limit`: (N,) each.

    limit: the 1% quantile of the training pictures' distances to their own nearest others.
    """

    nearest: np.ndarray
    distance: np.ndarray
    flagged: np.ndarray
    limit: float


def copy_limit(training: np.ndarray) -> float:
    """The 1% quantile of the distances of training pictures (M, D) to their own nearest others, M of 2 or more."""
    among = np.empty(len(training))
    for start in range(0, len(training), AT_ONCE):
        part = squared_distances(training[start : start + AT_ONCE], training, np.float32)  # enough for a quantile
        part[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        among[start : start + AT_ONCE] = part.min(1)
    return float(np.sqrt(np.quantile(among, QUANTILE)))


def find_copies(renderings: np.ndarray, training: np.ndarray, limit: float | None = None) -> Copies:
    """Memorisation as nearness in feature space; renderings (N, D), training (M, D). limit: theirs, where it is known.

    Search renderings of training captions too: those of held-out ones are no likely copies.
    """
    limit = copy_limit(training) if limit is None else limit
    squared = squared_distances(renderings, training)
    nearest = squared.argmin(1)
    rows = np.arange(len(renderings))
    exact = ((renderings.astype(np.float64) - training[nearest]) ** 2).sum(1)  # a copy's difference is lost in sums
    distance = np.sqrt(np.minimum(squared[rows, nearest], exact))
    return Copies(nearest, distance, distance <= limit if limit == 0 else distance < limit, limit)


@dataclass(frozen=True)
class Labels:
    """What pictures show and in which style, by the columns of their description."""

    concepts: np.ndarray
    styles: np.ndarray

    def rows(self, index: Sequence[int] | np.ndarray) -> "Labels":
        """Some of them."""
        return Labels(self.concepts[index], self.styles[index])


@dataclass(frozen=True)
class Found:
    """Whether the concept is among the five nearest, and whether the nearest is of the style: (N,) of 0 and 1."""

    concept: np.ndarray
    style: np.ndarray


def find(features: np.ndarray, asked: Labels, training: np.ndarray, labels: Labels) -> Found:
    """By cosine, among training pictures (M, D) of other (concept, style) pairs than the one asked for.

    Leaving the pair's own pictures out makes seen pairs and held-out pairs the same task.
    """
    near = _unit(features) @ _unit(training).T
    near[(asked.concepts[:, None] == labels.concepts) & (asked.styles[:, None] == labels.styles)] = -np.inf
    first = np.argsort(-near, axis=1, kind="stable")[:, :FIRST]
    concept = (labels.concepts[first] == asked.concepts[:, None]).any(1)
    return Found(concept.astype(float), (labels.styles[first[:, 0]] == asked.styles).astype(float))


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def pair_figures(
    rendered: np.ndarray, real: np.ndarray, asked: Labels, training: np.ndarray, labels: Labels, seed: int = 0
) -> dict[str, Figure]:
    """How often renderings find concept and style, how often the real pictures do, and the first as a share of that.

    Pairs whose concept no other training picture shows cannot be found by anybody, and are left out; {} if all are.
    """
    others = (asked.concepts[:, None] == labels.concepts) & (asked.styles[:, None] != labels.styles)
    rows = np.flatnonzero(others.any(1))
    if not len(rows):
        return {}
    asked = asked.rows(rows)
    ours, theirs = find(rendered[rows], asked, training, labels), find(real[rows], asked, training, labels)
    figures: dict[str, Figure] = {}
    for name in ("concept", "style"):
        one, other = getattr(ours, name), getattr(theirs, name)
        figures |= {name: mean_figure(one, seed), f"{name}_real": mean_figure(other, seed)}
        if other.any():
            figures[f"{name}_share"] = ratio_figure(one, other, seed)
    return figures
