"""Pictures varied in ways that keep what their captions say: mirrored, made smaller or larger, moved."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from latentgen.data.kept import key_of
from latentgen.data.picture import Picture

TRANSFORM = "mirrored, Lanczos, on plain ground or its edges repeated; 1"  # part of the cache key: change both together
ALIKE, PLAIN = 16, 0.5  # of 255: colours of one ground; the part of a picture's edge that makes it one
# Words of captions that a mirrored picture would make untrue.
SIDED = (
    "left", "right", "clockwise", "anticlockwise", "counterclockwise", "letter", "letters", "word", "words", "text",
    "writing", "number", "numbers", "digit", "digits",
)  # fmt: skip


@dataclass(frozen=True)
class Augmentation:
    """Each picture in so many `versions`, the first as it is.

    mirror: every second version is mirrored, but for pictures that `sided` words name in a caption. scale: the others
    are made smaller or larger by a factor between these two; smaller, a picture lies anywhere inside its own frame, on
    the plain ground it has or with its edges repeated around it, larger, any part of it is cut out.
    """

    versions: int = 1
    mirror: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    sided: tuple[str, ...] = SIDED
    seed: int = 0

    def others(self, pixels: np.ndarray, may: np.ndarray) -> tuple["Varied", ...]:
        """All versions of pictures (N, H, W, 3) but the first; may: which may be mirrored, (N,) bool."""
        own = [key_of(picture) for picture in pixels]
        return tuple(Varied(pixels, n, may & (n % 2 == 1), self, own) for n in range(1, self.versions))

    def line(self, may: np.ndarray) -> str:
        """How many versions there are, what is mirrored and what is not, for people."""
        mirrored = f"{may.sum()} pictures are mirrored too, {(~may).sum()} are not, for words of their captions"
        return f"data: {self.versions} versions of each picture{f'; {mirrored}' if self.mirror else ''}"

    def may_mirror(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Which pictures may be mirrored: (N,) bool."""
        if not self.mirror:
            return np.zeros(len(pictures), dtype=bool)
        if not self.sided:
            return np.ones(len(pictures), dtype=bool)
        words = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, self.sided))})(?!\w)", re.IGNORECASE)
        return np.array([not any(words.search(text) for text in own.captions) for own in pictures], dtype=bool)


@dataclass(frozen=True, eq=False)
class Varied:
    """One version of pictures (N, H, W, 3) uint8, made as its rows are read; `mirrored` (N,): which of them are.

    own: the digest of each picture (`data.kept.key_of`). How it is varied depends on that, the version and the seed
    alone, so that a picture added or taken away changes no other.
    """

    pixels: np.ndarray
    version: int
    mirrored: np.ndarray
    what: Augmentation
    own: Sequence[bytes]

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""
        return self.pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Some pictures (n, H, W, 3) by their numbers (n,)."""
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows.tolist()):
            found[place] = self._vary(row)
        return found

    @cached_property
    def keys(self) -> list[bytes]:
        """The digest of each row, for which no picture has to be varied."""
        return [key_of(f"{TRANSFORM}; {way}; ".encode() + own) for way, own in zip(self._ways, self.own, strict=True)]

    @cached_property
    def _ways(self) -> list[tuple[bool, float, float, float]]:
        """Whether each is mirrored, by how much it is scaled, and where it lies: parts of what room there is."""
        low, high = self.what.scale
        found = []
        for own, mirrored in zip(self.own, self.mirrored.tolist(), strict=True):
            key = np.random.SeedSequence([int.from_bytes(own, "big"), self.version, self.what.seed])
            drawn, left, top = np.random.Generator(np.random.Philox(key)).random(3).tolist()
            found.append((mirrored, low + (high - low) * drawn, left, top))
        return found

    def _vary(self, row: int) -> np.ndarray:
        mirrored, scale, left, top = self._ways[row]
        picture = np.asarray(self.pixels[row])
        if mirrored:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(picture if scale == 1 else scaled(picture, scale, left, top))


def scaled(picture: np.ndarray, scale: float, left: float, top: float) -> np.ndarray:
    """A picture (H, W, 3) uint8 made smaller or larger by a factor, as large as it was.

    Smaller it lies inside its frame: on its ground, where at least half of its edge has one colour, so that a thing
    that touches the edge ends there; else its edges are repeated. Larger it is cut. left, top: where, parts in [0, 1]
    of the room there is.
    """
    height, width = picture.shape[:2]
    wide, high = width / scale, height / scale  # what is seen, in pixels of the picture
    across, down = int(np.ceil(max(0.0, wide - width))), int(np.ceil(max(0.0, high - height)))
    padded = np.pad(picture, ((down, down), (across, across), (0, 0)), mode="edge")
    if (ground := _ground(picture)) is not None:
        padded[:] = ground
        padded[down : down + height, across : across + width] = picture
    x, y = across + left * (width - wide), down + top * (height - high)
    found = Image.fromarray(padded).resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + wide, y + high))
    return np.asarray(found)


def _ground(picture: np.ndarray) -> np.ndarray | None:
    """The colour (3,) that most of a picture's edge has; None where it has no one colour."""
    edge = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]]).astype(np.int16)
    ground = np.median(edge, axis=0)
    plain = (np.abs(edge - ground).max(axis=1) <= ALIKE).mean() >= PLAIN
    return ground.round().astype(np.uint8) if plain else None
