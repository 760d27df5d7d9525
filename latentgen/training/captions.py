"""Every caption of a training set once, and which of them belong to which picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentgen.data import Picture


@dataclass(frozen=True)
class Variety:
    """How a picture's captions vary from step to step.

    orders: a caption of comma-separated parts is known in so many orders, the first as it is written, the others drawn
    once from `seed` and the caption; its first `keep` parts stay in front. So each order is a text like any other,
    encoded once and cached, and which one a step sees is a pure function of (seed, step). long: with this probability
    a picture is told by its caption of the most words, else by one of its others; None takes all alike. Where a
    picture's captions have equally many words there is nothing to choose between.
    """

    orders: int = 1
    keep: int = 1
    long: float | None = None
    seed: int = 0


def order_parts(caption: str, what: Variety) -> list[str]:
    """The caption in `what.orders` orders of its comma-separated parts; as often as it is where there is one part."""
    parts = [part for piece in caption.split(",") if (part := piece.strip())]
    loose = parts[what.keep :]
    if len(loose) < 2:
        return [caption] * what.orders
    key = int.from_bytes(hashlib.sha256(f"{what.seed}; {caption}".encode()).digest()[:8], "big")
    random = np.random.Generator(np.random.Philox(key))
    found = {tuple(range(len(loose))): caption}
    for _ in range(8 * what.orders):  # different ones, where there are so many
        if len(found) < what.orders:
            order = tuple(int(i) for i in random.permutation(len(loose)))
            found.setdefault(order, ", ".join([*parts[: what.keep], *(loose[i] for i in order)]))
    texts = list(found.values())
    return [texts[i % len(texts)] for i in range(what.orders)]


class CaptionTable:
    """`texts`: the different captions, in the order met; picture i has `_numbers[_starts[i]:_starts[i+1]]`."""

    def __init__(self, pictures: Sequence[Picture], variety: Variety | None = None) -> None:
        what = variety or Variety()
        known: dict[str, int] = {}
        said = [[text for own in picture.captions for text in order_parts(own, what)] for picture in pictures]
        numbers = [[known.setdefault(text, len(known)) for text in texts] for texts in said]
        self.texts = tuple(known)
        self._numbers = np.array([number for row in numbers for number in row], dtype=np.int64)
        self._counts = np.array([len(row) for row in numbers], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self._edges: np.ndarray | None = None  # of picture i, from i to i + 1, as wide as each caption is likely
        if what.long is not None:
            chances = [_chances(picture.captions, what.long, what.orders) for picture in pictures]
            self._edges = np.concatenate([i + np.cumsum(row) for i, row in enumerate(chances)])

    def choose(self, items: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """One caption for each item, picked by a number in [0, 1) each: caption numbers (B,)."""
        if self._edges is None:
            return self._numbers[self._starts[items] + (uniform * self._counts[items]).astype(np.int64)]
        found = np.searchsorted(self._edges, items + uniform.astype(np.float64), side="right")
        return self._numbers[np.clip(found, self._starts[items], self._starts[items + 1] - 1)]

    def fingerprint(self) -> str:
        """Changes when any caption, or the picture it belongs to, does."""
        digest = hashlib.sha256("\n".join(self.texts).encode())
        digest.update(self._numbers.tobytes() + self._counts.tobytes())
        return digest.hexdigest()


def _chances(captions: Sequence[str], long: float, orders: int) -> np.ndarray:
    """Of each order of each caption, summing to 1: `long` among those of the most words, the rest among the others."""
    words = np.array([len(caption.split()) for caption in captions])
    longest = words == words.max()
    if longest.all():
        each = np.full(len(words), 1 / len(words))
    else:
        each = np.where(longest, long / longest.sum(), (1 - long) / (~longest).sum())
    return np.repeat(each / orders, orders)
