"""The captioned pictures of a run, decoded: those to train on and those held out; and the ledger of what became of
every file."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.data import (
    CaptionedFolder,
    Ledger,
    Picture,
    Pixels,
    count_tokens,
    hold_out,
    load_pixels,
    read_folder,
    write_ledger,
    write_page,
)
from latentgen.durable import write_file
from latentgen.errors import InputError
from latentgen.training.captions import CaptionTable


@dataclass(frozen=True)
class TrainingData:
    """The captioned pictures of a run, decoded: those to train on and those held out."""

    pixels: np.ndarray
    pictures: tuple[Picture, ...]
    held_pixels: np.ndarray
    held: tuple[Picture, ...]
    weights: np.ndarray

    @cached_property
    def captions(self) -> CaptionTable:
        """Every caption to train on."""
        return CaptionTable(self.pictures)

    @cached_property
    def held_captions(self) -> tuple[str, ...]:
        """The main caption of each held-out picture."""
        return tuple(picture.captions[0] for picture in self.held)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any pixel, caption or weight."""
        digest = hashlib.sha256(self.captions.fingerprint().encode())
        for array in (self.pixels, self.held_pixels, self.weights):
            for start in range(0, len(array), 256):  # memory-mapped: a few rows at a time
                digest.update(np.ascontiguousarray(array[start : start + 256]).data)
        return digest.hexdigest()


def read_pictures(
    root: Path, size: int, cache: Path, *, captions: str, background: str, held_out: str, part: float
) -> tuple[CaptionedFolder, Pixels, str]:
    """The folder, its pixels, and a line for people where pictures were held out that nobody had marked ("" if not).

    part: of the pictures, held out where none is in the split `held_out`.
    """
    marked = read_folder(root, captions)
    folder = hold_out(marked, held_out, part)
    taught_first = sorted(folder.pictures, key=lambda picture: picture.split == held_out)
    pixels = load_pixels(taught_first, size, cache, background)
    if folder is marked:
        return folder, pixels, ""
    count = len(folder.select(held_out))
    return folder, pixels, f"data: no picture is marked {held_out!r}, so {count} are held out by their names"


def divide(root: Path, pixels: Pixels, held_out: str, weights: Mapping[str, Mapping[str, float]]) -> TrainingData:
    """The pictures of the split `held_out` apart from the others. Raises InputError where either has none.

    Where all those held out come last, as `read_pictures` has them, no pixel is read: both stay memory-mapped.
    """
    held = np.array([picture.split == held_out for picture in pixels.pictures])
    if held.all() or not held.any():
        raise InputError(
            f"{root}: {'all' if held.all() else 'no'} pictures are held out (split {held_out!r}); mark about a "
            f'twentieth of them with "split": "{held_out}", or none and set hold_out = 0.05 in [data]'
        )
    taught = [picture for picture, out in zip(pixels.pictures, held, strict=True) if not out]
    tested = [picture for picture, out in zip(pixels.pictures, held, strict=True) if out]
    factors = np.array([_weight(picture, weights) for picture in taught])
    count, array = len(taught), pixels.array
    last = not held[:count].any()
    ours, theirs = (array[:count], array[count:]) if last else (np.ascontiguousarray(array[~held]), array[held])
    return TrainingData(ours, tuple(taught), theirs, tuple(tested), factors)


def look_over(folder: CaptionedFolder, size: int, background: str, cache: Path) -> Ledger:
    """The ledger of the folder; what was seen is kept in `cache`, so that a resumed run opens only what changed."""
    return write_ledger(folder, size, background, cache / "survey.json")


def keep_ledger(ledger: Ledger, lengths: Mapping[str, int], words: Any, state: Path | None) -> str:
    """Writes ledger.json and ledger.html into a run's own folder; says where, on one line.

    lengths: of every caption in tokens; words: the tokenizer. state: None writes nothing and only says the line. The
    page is made anew only when the ledger has changed.
    """

    def pieces(asked: Sequence[str]) -> list[int]:
        return [len(ids) for ids in words(list(asked), add_special_tokens=False).input_ids] if asked else []

    counted = count_tokens(ledger, lengths, words.model_max_length, pieces)
    if state is None:
        return f"data: {counted.line()}"
    table, page = state / "ledger.json", state / "ledger.html"
    told = counted.as_json().encode()
    if not (table.is_file() and page.is_file() and table.read_bytes() == told):
        write_file(page, write_page(counted).encode())
        write_file(table, told)
    return f"data: {counted.line()}; see {page}"


def _weight(picture: Picture, weights: Mapping[str, Mapping[str, float]]) -> float:
    """The product of what the recipe says of each of the picture's columns."""
    factors = (table.get(str(picture.attributes.get(column)), 1.0) for column, table in weights.items())
    return float(np.prod(list(factors))) if weights else 1.0
