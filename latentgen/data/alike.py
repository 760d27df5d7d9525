"""Pictures that are alike: the same pixels, or a near copy (scaled, saved anew, a little altered)."""

from collections.abc import Callable, Sequence

import numpy as np

from latentgen.data.survey import Facts

BITS, TINT = 3, 10.0  # near: at most so many of the 64 bits differ, and no mean of 4 x 4 colours by more than so much
MEANING = (
    f"near: 64-bit difference hashes {BITS} bits apart at most, and no mean colour of a 4 x 4 grid by more than "
    f"{TINT:.0f} of 255"
)
PAIRS_AT_ONCE = 2**22
MOST = 256  # earlier near ones looked at for each picture; only a folder of blank pictures has more
_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)


def find_alike(
    facts: Sequence[Facts], with_pixels: Callable[[Sequence[int]], Sequence[Facts]]
) -> tuple[dict[int, int], dict[int, int]]:
    """Which pictures have an earlier one of the same pixels, and which only an earlier near one: index -> index.

    with_pixels: the facts of pictures, by index, with the hash of their pixels; asked only for those that may be equal.
    All pairs are compared, N**2 / 2 of them: about a second for 20,000 pictures.
    """
    near = _near(facts)
    maybe = {index: [one for one in ones if _size(facts[one]) == _size(facts[index])] for index, ones in near.items()}
    asked = sorted({index for index, ones in maybe.items() if ones} | {one for ones in maybe.values() for one in ones})
    pixels = {index: seen.pixels for index, seen in zip(asked, with_pixels(asked), strict=True)}
    exact: dict[int, int] = {}
    for index, ones in maybe.items():
        same = [one for one in ones if pixels[one] and pixels[one] == pixels[index]]
        if same:
            exact[index] = same[0]
    return exact, {index: ones[0] for index, ones in near.items() if index not in exact}


def _near(facts: Sequence[Facts]) -> dict[int, list[int]]:
    """Index -> the earlier near ones."""
    usable = np.array([index for index, one in enumerate(facts) if not one.error], dtype=np.int64)
    marks = np.array([facts[index].mark for index in usable], dtype=np.uint64)
    tints = np.array([list(bytes.fromhex(facts[index].tint)) for index in usable], dtype=np.int16).reshape(-1, 48)
    found: dict[int, list[int]] = {}
    rows = max(1, PAIRS_AT_ONCE // max(1, len(usable)))
    for start in range(0, len(usable), rows):
        stop = min(start + rows, len(usable))
        apart = _count(marks[start:stop, None] ^ marks[None, :stop])
        close = np.tril(apart <= BITS, start - 1)  # earlier ones only
        for row in np.flatnonzero(close.any(axis=1)):
            others = np.flatnonzero(close[row])
            others = others[np.abs(tints[others] - tints[start + row]).max(axis=1) <= TINT]
            if len(others):
                others = others[:MOST]
                found[int(usable[start + row])] = [int(index) for index in usable[others]]
    return found


def _count(words: np.ndarray) -> np.ndarray:
    """How many bits of each 64-bit word are set."""
    if hasattr(np, "bitwise_count"):  # since NumPy 2.0
        return np.bitwise_count(words)
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 4)
    return _ONES[halves].sum(axis=-1, dtype=np.uint8)


def _size(facts: Facts) -> tuple[int, int]:
    return facts.width, facts.height
