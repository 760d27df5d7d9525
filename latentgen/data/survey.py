"""What each picture of a folder is: its size, its frames, and two small marks by which alike pictures are found.

Facts are kept in one JSON file under the file's date and length, so that a second survey opens only what changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentgen.data.decode import CannotDecode, Opener
from latentgen.data.picture import Picture
from latentgen.durable import write_file

FORM = 3  # of the kept facts: raised when what they mean changes
DRAFT = 64  # pixels; a large JPEG is read at an eighth for the marks
STEP = 2  # of 255: brighter by no more is not brighter, so that the noise of a JPEG's flat parts says nothing
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Facts:
    """width, height in pixels, upright; `mark`: 64-bit difference hash; `tint`: 4 x 4 RGB means, 48 bytes in hex.

    pixels: SHA-256 of the decoded pixels, taken only where another picture is alike; "" before. error: why it cannot be
    read, "" if it can.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    frames: int = 1
    transparent: bool = False
    mark: int = 0
    tint: str = ""
    pixels: str = ""
    error: str = ""


class Survey:
    """The facts of pictures, read once; `root` is the folder that their names are relative to."""

    def __init__(self, root: Path, opener: Opener, kept: Path | None = None) -> None:
        self.root, self.opener, self.kept = root, opener, kept
        self._known: dict[str, list[Any]] = self._read()
        self._changed = False

    def facts(self, pictures: Sequence[Picture], progress: Progress | None = None) -> list[Facts]:
        """The facts of each picture, in order."""
        return self._each(pictures, lambda picture, known: known or self._look(picture), progress)

    def with_pixels(self, pictures: Sequence[Picture]) -> list[Facts]:
        """As `facts`, with the hash of all their pixels."""

        def hashed(picture: Picture, known: Facts | None) -> Facts:
            facts = known or self._look(picture)
            if facts.pixels or facts.error:
                return facts
            try:
                image = self.opener.open(picture).image
            except CannotDecode as error:
                return Facts(error=str(error))
            digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes())
            return replace(facts, pixels=digest.hexdigest())

        return self._each(pictures, hashed, None)

    def save(self) -> None:
        """Keep the facts for the next survey, where there is something new and a place for it."""
        if self.kept is not None and self._changed:
            table = {"form": FORM, "background": self.opener.colour, "pictures": self._known}
            write_file(self.kept, json.dumps(table).encode())
            self._changed = False

    def _each(
        self, pictures: Sequence[Picture], see: Callable[[Picture, Facts | None], Facts], progress: Progress | None
    ) -> list[Facts]:
        names = [f"{picture.path.relative_to(self.root).as_posix()}{picture.box or ''}" for picture in pictures]
        found: list[Facts] = []

        def one(item: tuple[str, Picture]) -> tuple[list[int], Facts]:
            stamp = item[1].stamp
            known = self._known.get(item[0])
            return stamp, see(item[1], Facts(**known[2]) if known is not None and known[:2] == stamp else None)

        with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
            for name, (stamp, facts) in zip(names, pool.map(one, zip(names, pictures, strict=True)), strict=True):
                found.append(facts)
                kept = [*stamp, _brief(facts)]
                if not facts.error and self._known.get(name) != kept:  # what cannot be read is tried again
                    self._known[name] = kept
                    self._changed = True
                if progress is not None:
                    progress(len(found), len(pictures))
        return found

    def _look(self, picture: Picture) -> Facts:
        try:
            opened = self.opener.open(picture, DRAFT)
        except CannotDecode as error:
            return Facts(error=str(error))
        width, height = opened.size
        tint = np.asarray(opened.image.resize((4, 4), Image.Resampling.BOX)).tobytes().hex()
        return Facts(width, height, opened.mode, opened.frames, opened.transparent, difference_hash(opened.image), tint)

    def _read(self) -> dict[str, list[Any]]:
        if self.kept is None:
            return {}
        try:
            table = json.loads(self.kept.read_text(encoding="utf-8"))
            same = table["form"] == FORM and tuple(table["background"]) == self.opener.colour
            return dict(table["pictures"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def difference_hash(image: Image.Image) -> int:
    """64 bits, row by row: whether each of 8 x 8 neighbours on a 9 x 8 grid of greys is darker than the one before it.

    After N. Krawetz, "Kind of like that" (2013).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = grey[:, :-1] - grey[:, 1:] > STEP
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _brief(facts: Facts) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(facts).items() if value != Facts.__dataclass_fields__[name].default}
