"""Pairs of concept and style: those held out, and seen ones that are told from them by nothing but being seen.

A held-out pair is of a concept that other styles show. So its counterpart is a training picture of the same concept in
another style, not any training picture: of those many have a concept that only one style shows, or flags, or faces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentgen.data import Picture
from latentgen.errors import InputError
from latentgen.evaluation.metrics import Figure
from latentgen.evaluation.neighbours import Labels, pair_figures

CONCEPTS, STYLES = ("codepoint", "concept", "label"), ("style",)


@dataclass(frozen=True)
class PairLabels:
    """Concepts and styles of the pictures held out and of those trained on."""

    held: Labels
    known: Labels

    @property
    def new(self) -> np.ndarray:
        """The rows of `held` whose pair no training picture has."""
        seen = set(zip(self.known.concepts, self.known.styles, strict=True))
        pairs = enumerate(zip(self.held.concepts, self.held.styles, strict=True))
        return np.array([row for row, pair in pairs if pair not in seen], dtype=np.int64)


def column(pictures: Sequence[Picture], named: str | None, likely: Sequence[str]) -> str | None:
    """The column asked for, or the first of the likely ones that every picture has. Raises InputError."""
    has = [name for name in ([named] if named else likely) if all(name in p.attributes for p in pictures)]
    if named and not has:
        raise InputError(f"column {named!r} is not in every line of the pictures' metadata")
    return has[0] if has else None


def labels_of(
    held: Sequence[Picture], training: Sequence[Picture], concept: str | None = None, style: str | None = None
) -> PairLabels | None:
    """From the columns of that name, or the likely ones; None where there are none. Raises InputError."""
    one, other = column([*held, *training], concept, CONCEPTS), column([*held, *training], style, STYLES)
    if one is None or other is None:
        return None

    def labels(pictures: Sequence[Picture]) -> Labels:
        return Labels(*(np.array([str(p.attributes[name]) for p in pictures]) for name in (one, other)))

    return PairLabels(labels(held), labels(training))


def seen_rows(labels: PairLabels | None, training: int, held: int, seed: int) -> np.ndarray:
    """The training pictures whose captions are rendered too, in an order of the seed's.

    One for each held-out pair, of the same concept in another style, none twice where it can be; without labels, or
    where no concept has another style, any, as many as are held out.
    """
    turns = np.random.default_rng(seed + 1).permutation(training)
    if labels is None:
        return turns[:held]
    asked = labels.held.rows(labels.new) if len(labels.new) else labels.held
    concepts, styles = labels.known.concepts[turns], labels.known.styles[turns]
    chosen: dict[int, int] = {}  # row -> how often
    rows: list[int] = []
    for concept, style in zip(asked.concepts, asked.styles, strict=True):
        fit = turns[(concepts == concept) & (styles != style)].tolist()
        if fit:
            row = min(fit, key=lambda row: chosen.get(row, 0))
            chosen[row] = chosen.get(row, 0) + 1
            rows.append(row)
    return np.array(rows, dtype=np.int64) if rows else turns[:held]


def seen_and_held_out(
    labels: PairLabels,
    features: tuple[np.ndarray, np.ndarray, np.ndarray],
    some: np.ndarray,
    seen: np.ndarray,
    seed: int,
) -> dict[str, Figure]:
    """How often concept and style are found, for pairs held out and for seen ones of the same concepts.

    features: of the renderings, the held-out pictures and the training pictures; seen: of the renderings of the
    training captions `some`.
    """
    (ours, theirs, known), new = features, labels.new
    asked, figures = labels.held.rows(new), dict[str, Figure]()
    if len(new):
        found = pair_figures(ours[new], theirs[new], asked, known, labels.known, seed)
        figures |= {f"held-out pairs: {name.replace('_', ', ')}": figure for name, figure in found.items()}
    found = pair_figures(seen, known[some], labels.known.rows(some), known, labels.known, seed)
    return figures | {f"seen pairs: {name.replace('_', ', ')}": figure for name, figure in found.items()}
