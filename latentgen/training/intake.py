"""The captioned pictures of a run, decoded: those to train on and those held out; and the ledger of what became of
every file."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.data import (
    Buckets,
    CaptionedFolder,
    Ledger,
    Picture,
    Pixels,
    count_tokens,
    hold_out,
    keep_fitting,
    load_pixels,
    page,
    read_folder,
    write_ledger,
)
from latentgen.data.decode import Opener
from latentgen.data.remote import as_told
from latentgen.data.survey import Facts, Survey
from latentgen.errors import InputError
from latentgen.training.captions import CaptionTable


@dataclass(frozen=True)
class Shaped:
    """Pictures in the shapes of their buckets: picture i is row `row[i]` of `pixels[bucket[i]]`, (n, h, w, 3)."""

    pixels: tuple[np.ndarray, ...]
    bucket: np.ndarray
    row: np.ndarray

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any pixel."""
        digest = hashlib.sha256(self.bucket.tobytes() + self.row.tobytes())
        for array in self.pixels:
            _add(digest, array)
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainingData:
    """The captioned pictures of a run, decoded: those to train on and those held out.

    pixels: squares; shaped, held_shaped: the same pictures in the shapes of their buckets, where there are buckets.
    """

    pixels: np.ndarray
    pictures: tuple[Picture, ...]
    held_pixels: np.ndarray
    held: tuple[Picture, ...]
    weights: np.ndarray
    shaped: Shaped | None = None
    held_shaped: Shaped | None = None

    @cached_property
    def captions(self) -> CaptionTable:
        """Every caption to train on."""
        return CaptionTable(self.pictures)

    @property
    def shaped_line(self) -> str:
        """How many pictures to train on each shape holds."""
        arrays = self.shaped.pixels if self.shaped is not None else ()
        return ", ".join(f"{array.shape[2]} x {array.shape[1]}: {len(array)}" for array in arrays if len(array))

    @cached_property
    def held_captions(self) -> tuple[str, ...]:
        """The main caption of each held-out picture."""
        return tuple(picture.captions[0] for picture in self.held)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any pixel, caption or weight."""
        digest = hashlib.sha256(self.captions.fingerprint().encode())
        for array in (self.pixels, self.held_pixels, self.weights):
            _add(digest, array)
        return digest.hexdigest()

    @cached_property
    def held_fingerprint(self) -> str:
        """Changes with any held-out picture's main caption."""
        return hashlib.sha256("\n".join(self.held_captions).encode()).hexdigest()[:12]


def read_pictures(
    root: Path,
    size: int,
    cache: Path,
    *,
    captions: str,
    background: str,
    held_out: str,
    part: float,
    folders: bool = True,
    buckets: Buckets | None = None,
) -> tuple[CaptionedFolder, Pixels, str]:
    """The folder, its pixels, and a line for people where pictures were held out that nobody had marked ("" if not).

    part: of the pictures, held out where none is in the split `held_out`. folders: as `read_folder` takes it.
    buckets: what fits none is left out.
    """
    marked = read_folder(root, captions, folders=folders)
    if buckets is not None:
        marked, _ = keep_fitting(marked, _facts(marked.root, marked.pictures, cache, background), buckets)
    folder = hold_out(marked, held_out, part)
    remark = ""
    if folder is not marked:
        count = len(folder.select(held_out))
        remark = f"data: no picture is marked {held_out!r}, so {count} are held out by their names"
    taught_first = sorted(folder.pictures, key=lambda picture: picture.split == held_out)
    pixels = load_pixels(taught_first, size, cache, background)
    if folder is not marked and len({picture.split == held_out for picture in pixels.pictures}) == 1:
        torn = {problem.path for problem in pixels.problems}  # all that were held out, or all the others
        readable = replace(marked, pictures=tuple(p for p in marked.pictures if p.path not in torn))
        divided = hold_out(readable, held_out, part)
        rest = tuple(picture for picture in marked.pictures if picture.path in torn)
        folder = replace(divided, pictures=(*divided.pictures, *rest))
        taught_first = sorted(folder.pictures, key=lambda picture: picture.split == held_out)
        pixels = load_pixels(taught_first, size, cache, background)
    return folder, pixels, remark


def in_shapes(data: TrainingData, root: Path, buckets: Buckets, cache: Path, background: str) -> TrainingData:
    """The data with its pictures also in the shapes of their buckets. root: of the folder they are from."""

    def shaped(pictures: Sequence[Picture]) -> Shaped:
        seen = _facts(root, pictures, cache, background)
        bucket = np.array([buckets.fit(one.width, one.height).bucket for one in seen])
        row, arrays = np.zeros(len(pictures), dtype=np.int64), []
        for number, (width, height) in enumerate(buckets.shapes):
            own = np.flatnonzero(bucket == number)
            row[own] = np.arange(len(own))
            if not len(own):
                arrays.append(np.zeros((0, height, width, 3), np.uint8))
                continue
            loaded = load_pixels([pictures[item] for item in own.tolist()], (width, height), cache, background)
            if loaded.problems:
                first = loaded.problems[0]
                raise InputError(f"{first.path}: {first.reason}, which it was not before; run again")
            arrays.append(loaded.array)
        return Shaped(tuple(arrays), bucket, row)

    return replace(data, shaped=shaped(data.pictures), held_shaped=shaped(data.held))


def _facts(root: Path, pictures: Sequence[Picture], cache: Path, background: str) -> list[Facts]:
    survey = Survey(root, Opener(background), cache / "survey.json")
    facts = survey.facts(pictures)
    survey.save()
    return facts


def _add(digest: Any, array: np.ndarray) -> None:
    """The bytes of an array that may be memory-mapped, a few rows at a time."""
    for start in range(0, len(array), 256):
        digest.update(np.ascontiguousarray(array[start : start + 256]).data)


def divide(root: Path, pixels: Pixels, held_out: str, weights: Mapping[str, Mapping[str, float]]) -> TrainingData:
    """The pictures of the split `held_out` apart from the others. Raises InputError where either has none.

    Where all those held out come last, as `read_pictures` has them, no pixel is read: both stay memory-mapped.
    """
    held = np.array([picture.split == held_out for picture in pixels.pictures])
    if held.all() or not held.any():
        raise InputError(
            f"{as_told(root)}: {'all' if held.all() else 'no'} pictures are held out (split {held_out!r}); mark about "
            f'a twentieth of them with "split": "{held_out}", or none and set hold_out = 0.05 in [data]'
        )
    taught = [picture for picture, out in zip(pixels.pictures, held, strict=True) if not out]
    tested = [picture for picture, out in zip(pixels.pictures, held, strict=True) if out]
    factors = np.array([_weight(picture, weights) for picture in taught])
    if not factors.any():
        raise InputError("[data.weights] leaves no picture to train on: all weigh 0; weigh some of them more")
    count, array = len(taught), pixels.array
    last = not held[:count].any()
    ours, theirs = (array[:count], array[count:]) if last else (np.ascontiguousarray(array[~held]), array[held])
    return TrainingData(ours, tuple(taught), theirs, tuple(tested), factors)


def look_over(
    folder: CaptionedFolder, size: int, background: str, cache: Path, buckets: Buckets | None = None
) -> Ledger:
    """The ledger of the folder; what was seen is kept in `cache`, so that a resumed run opens only what changed."""
    return write_ledger(folder, size, background, cache / "survey.json", buckets=buckets)


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
    return f"data: {counted.line()}; see {page.keep_ledger(counted, state)}"


def unknown_weights(pictures: Sequence[Picture], weights: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each column that the recipe weighs by values which no picture has."""
    lines = []
    for column, table in weights.items():
        found = {str(picture.attributes.get(column)) for picture in pictures}
        if absent := [value for value in table if value not in found]:
            lines.append(f"data: [data.weights.{column}] weighs {', '.join(absent)}, which no picture to train on has")
    return lines


def _weight(picture: Picture, weights: Mapping[str, Mapping[str, float]]) -> float:
    """The product of what the recipe says of each of the picture's columns."""
    factors = (table.get(str(picture.attributes.get(column)), 1.0) for column, table in weights.items())
    return float(np.prod(list(factors))) if weights else 1.0
