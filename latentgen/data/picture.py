"""One picture of a folder and what is said of it; and a file that is not used, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels of the file
Kind = Literal["unreadable", "without caption", "not a picture", "named again"]


@dataclass(frozen=True)
class Picture:
    """One picture and what is said of it; the captions are non-empty, the first is the main one.

    box: the part of the file that it is; None is all of it.
    """

    path: Path
    captions: tuple[str, ...]
    split: str = "train"
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    box: Box | None = None


@dataclass(frozen=True)
class Problem:
    """A file (or one mention of it) that is not used, and why, in words for people and as one of a few kinds."""

    path: Path
    reason: str
    kind: Kind = "unreadable"
