"""Every caption of a training set once, and which of them belong to which picture."""

import hashlib
from collections.abc import Sequence

import numpy as np

from latentgen.data import Picture


class CaptionTable:
    """`texts`: the different captions, in the order met; picture i has `_numbers[_starts[i]:_starts[i+1]]`."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        known: dict[str, int] = {}
        numbers = [[known.setdefault(text, len(known)) for text in picture.captions] for picture in pictures]
        self.texts = tuple(known)
        self._numbers = np.array([number for row in numbers for number in row], dtype=np.int64)
        self._counts = np.array([len(row) for row in numbers], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])

    def choose(self, items: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """One caption for each item, picked by a number in [0, 1) each: caption numbers (B,)."""
        return self._numbers[self._starts[items] + (uniform * self._counts[items]).astype(np.int64)]

    def fingerprint(self) -> str:
        """Changes when any caption, or the picture it belongs to, does."""
        digest = hashlib.sha256("\n".join(self.texts).encode())
        digest.update(self._numbers.tobytes() + self._counts.tobytes())
        return digest.hexdigest()
