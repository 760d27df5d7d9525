"""One picture and what is said of it; and a file that is not used, with the reason."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels of the file
PROFILED = b"; in sRGB"
MARKS = (b"acsp", b"iCCP")  # in every profile; and in a PNG, which compresses it
TIFF, HEAD = (b"II", b"MM"), 1 << 19
Kind = Literal["unreadable", "without caption", "not a picture", "named again", "hidden", "does not fit"]


def stamp_of(path: Path) -> list[int]:
    """When a file was written, in nanoseconds, and its bytes; zeros where there is none."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0]
    return [status.st_mtime_ns, status.st_size]


def content_of(data: bytes) -> bytes:
    """What a picture's file is known by: its SHA-256, and a mark where it may hold a colour profile.

    The mark is for pixels that were kept before profiles were heeded: those of other files are still right.
    """
    end = len(data) if data.startswith(TIFF) else HEAD  # anywhere in a TIFF, and before the pixels in others
    profiled = any(data.find(mark, 0, end) >= 0 for mark in MARKS)
    return hashlib.sha256(data).digest() + (PROFILED if profiled else b"")


class Stored(Protocol):
    """Where the bytes of a picture stand that is no file of its own: a member of a shard, a row of a table."""

    @property
    def container(self) -> Path:
        """The file that holds them, on the disk or at an address."""

    @property
    def stamp(self) -> list[int]:
        """What changes when that file does."""

    def read(self) -> bytes:
        """The bytes, as a picture file would have them. Raises OSError."""

    def content(self) -> bytes:
        """`content_of` them. Raises OSError."""


@dataclass(frozen=True)
class Picture:
    """One picture and what is said of it; the captions are non-empty, the first is the main one.

    split: "" while nothing says it. box: the part of the file that it is; None is all of it. stored: where its bytes
    stand if `path` is no file on the disk but a name below one (shard.tar/0001.jpg); None is the file `path`.
    """

    path: Path
    captions: tuple[str, ...]
    split: str = "train"
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    box: Box | None = None
    stored: Stored | None = None

    @property
    def file(self) -> Path:
        """The file that its bytes are in."""
        return self.stored.container if self.stored is not None else self.path

    @property
    def stamp(self) -> list[int]:
        """What changes when that file does."""
        return self.stored.stamp if self.stored is not None else stamp_of(self.path)

    def read(self) -> bytes:
        """The bytes of its picture file. Raises OSError."""
        return self.stored.read() if self.stored is not None else self.path.read_bytes()

    def content(self) -> bytes:
        """`content_of` its picture file. Raises OSError."""
        return self.stored.content() if self.stored is not None else content_of(self.read())


@dataclass(frozen=True)
class Problem:
    """A file (or one mention of it) that is not used, and why, in words for people and as one of a few kinds.

    box, stored, split: as the picture has them, where it is one.
    """

    path: Path
    reason: str
    kind: Kind = "unreadable"
    box: Box | None = None
    stored: Stored | None = field(default=None, compare=False)
    split: str = "train"
