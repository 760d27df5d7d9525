"""What the names of files say: which split a picture is in, and which file another name means."""

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

SPLITS = {  # folders below the root, as `datasets` takes them
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}


def split_of(root: Path, path: Path) -> str:
    """The split that the first folder below `root` names; "train" where it names none."""
    first, *below = path.relative_to(root).parts
    return SPLITS.get(first.lower(), "train") if below else "train"


def composed(name: Path | str) -> str:
    """A name with each accent in its letter (NFC); archives made on a Mac have them apart (NFD)."""
    return unicodedata.normalize("NFC", str(name))


class Found:
    """Files that there are, also by names whose accents or capitals are written otherwise."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = frozenset(files)

    def __contains__(self, path: Path) -> bool:
        return path in self._files

    def alike(self, path: Path) -> Path | None:
        """The one file whose name differs in the form of its accents, or else in capitals; None for none or several."""
        found = self._folded.get(_folded(path), [])
        same = [file for file in found if composed(file) == composed(path)] or found
        return same[0] if len(same) == 1 else None

    @cached_property
    def _folded(self) -> dict[str, list[Path]]:
        table: dict[str, list[Path]] = {}
        for file in self._files:
            table.setdefault(_folded(file), []).append(file)
        return table


def _folded(path: Path) -> str:
    return composed(composed(path).casefold())
