"""A folder of captioned pictures, read with nothing silent; no picture is opened.

Captions come from tables (`metadata.jsonl`, `.csv` or `.parquet`, in the folder or in sub-folders; see
`data.metadata`), from a sidecar beside a picture that no table names (`cat.txt` or `cat.caption` for `cat.png`, one
caption a line), or, when asked for, from the names of the files. A `box` ([left, upper, right, lower], in pixels) says
that the picture is that part of its file, so that many small ones can lie in one sheet. What is wrong with a
description is an error; what is merely unused (a picture nothing describes) is a `Problem`, so that every picture found
is either used or listed with the reason.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from latentgen.data.metadata import NAMES, clean_captions, is_torn, read_metadata, read_text
from latentgen.data.names import composed, split_of
from latentgen.data.picture import Picture, Problem
from latentgen.errors import InputError

SIDECARS = (".txt", ".caption")
_JPEG, _PNG = {".jfif", ".jpe", ".jpeg", ".jpg"}, {".apng", ".png"}
PICTURES = frozenset({*_JPEG, *_PNG, ".avif", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
SOURCES = ("files", "names")  # of captions: tables and sidecars, or the names of the picture files
_NUMBER = re.compile(r"[\s(\[]*\b\d+[)\]]*$")  # at a name's end: "red apple 02", "red apple (2)"


@dataclass(frozen=True)
class CaptionedFolder:
    """The pictures of one folder in the order of its description, and the files in it that are not used.

    descriptions: the files that the captions were read from. containers: files that hold many pictures, of which each
    is told by a name below its file. files: those there are; None is all below `root`. remark: a line for people where
    pictures are in a split by the folder they are in; else "".
    """

    root: Path
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]
    descriptions: tuple[Path, ...] = ()
    containers: tuple[Path, ...] = ()
    files: tuple[Path, ...] | None = None
    remark: str = ""

    def select(self, split: str) -> tuple[Picture, ...]:
        """The pictures of one split ("train", "test", ...), in order; empty if the folder has no such split."""
        return tuple(picture for picture in self.pictures if picture.split == split)


def read_files(root: Path, captions: str = "files") -> CaptionedFolder:
    """Reads the captions of the folder `root` and its sub-folders. captions: "files" or "names" (see above).

    Raises InputError for a folder that is missing or holds no pictures or no captions, a metadata line that is no JSON
    object or has columns of the wrong kind, two tables in one folder, and an entry that names a missing picture.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}; give a folder of pictures with {NAMES[0]} or .txt captions beside them")
    there, beyond = walk(root)
    files = [path for path in there if not is_hidden(path.relative_to(root))]
    found = [path for path in files if path.suffix.lower() in PICTURES]
    if not found:
        raise InputError(f"{root} holds no pictures; put {listing(PICTURES)} files there")
    named = captions == "names"
    pictures, problems, descriptions = _from_names(found) if named else _from_files(found, files)
    if not pictures:
        first = next((f" ({p.reason})" for p in problems if p.kind == "without caption" and ";" in p.reason), "")
        raise InputError(
            f"{root} holds {len(found)} pictures but no captions{first}; write a {NAMES[0]} or a .txt file beside each "
            "picture, or have them named by their files (captions = names)"
        )
    problems += [problem for problem in beyond if not is_hidden(problem.path.relative_to(root))]
    return CaptionedFolder(root, tuple(pictures), tuple(problems), tuple(descriptions))


def in_splits(folder: CaptionedFolder, by_name: bool) -> CaptionedFolder:
    """The folder with each picture that is told no split ("") in "train"; by_name: in that of the folder it is in."""

    def split_for(path: Path) -> str:
        return split_of(folder.root, path) if by_name else "train"

    pictures = tuple(p if p.split else replace(p, split=split_for(p.path)) for p in folder.pictures)
    problems = tuple(p if p.split else replace(p, split=split_for(p.path)) for p in folder.problems)
    untold = (picture.split for picture, as_read in zip(pictures, folder.pictures, strict=True) if not as_read.split)
    counts = sorted(Counter(split for split in untold if split != "train").items())
    placed = ", ".join(f"{count} {split!r}" for split, count in counts)
    remark = f"data: pictures in a split by their folder: {placed}" if counts else ""
    return replace(folder, pictures=pictures, problems=problems, remark=remark)


def walk(root: Path) -> tuple[list[Path], list[Problem]]:
    """All files below a folder, sorted, those of linked folders too; and what there is that cannot be reached."""
    found: list[Path] = []
    problems: list[Problem] = []

    def closed(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"cannot be read ({error.strerror})", "unreadable"))

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=closed):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it, or twice to one
            folders.clear()
            problems.append(Problem(Path(folder), "a link to a folder that is read already", "unreadable"))
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort(key=lambda name: (Path(folder, name).is_symlink(), name))  # what is linked to, before links
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                found.append(path)
            elif path.is_symlink():
                problems.append(Problem(path, "a link to nothing that is there", "unreadable"))
    return sorted(found), problems


def is_hidden(relative: Path) -> bool:
    """Whether a file or a folder above it has a name that starts with a dot."""
    return any(part.startswith(".") for part in relative.parts)


def caption_of_name(stem: str) -> str:
    """ "red-apple_02" -> "red apple": words apart, numbers at the end gone; "" where no letter is left."""
    words = " ".join(stem.replace("_", " ").replace("-", " ").split())
    words = _NUMBER.sub("", words)
    return words if any(letter.isalpha() for letter in words) else ""


def listing(names: Iterable[str]) -> str:
    """ "a, b or c", sorted."""
    *first, last = sorted(names)
    return f"{', '.join(first)} or {last}"


def _from_names(found: Sequence[Path]) -> tuple[list[Picture], list[Problem], list[Path]]:
    said = [(path, caption_of_name(path.stem)) for path in found]
    pictures, problems = [], []
    for path, caption in said:
        if caption and not is_torn(caption):
            pictures.append(Picture(path, (caption,), ""))
        else:
            reason = "its name is not UTF-8" if caption else "its name holds no words"
            problems.append(Problem(path, reason, "without caption", split=""))
    return pictures, problems, []


def _from_files(found: Sequence[Path], files: Sequence[Path]) -> tuple[list[Picture], list[Problem], list[Path]]:
    tables = [path for path in files if path.name in NAMES]
    for one, other in pairwise(tables):
        if one.parent == other.parent:
            raise InputError(f"{one.parent} has both {one.name} and {other.name}; keep one of them")
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for table in tables:
        named, unused = read_metadata(table, found)
        before = {(picture.path, picture.box) for picture in pictures}
        again = f"named again in {table}; the first entry is used"
        problems += [Problem(p.path, again, "named again", p.box) for p in named if (p.path, p.box) in before]
        pictures += [picture for picture in named if (picture.path, picture.box) not in before]
        problems += unused
    described = {picture.path for picture in pictures} | {problem.path for problem in problems}
    table_names = " or ".join(sorted({table.name for table in tables}))
    rest = [path for path in found if path not in described]
    beside, unnamed, sidecars = _from_sidecars(rest, files, table_names)
    told = {*sidecars, *(problem.path for problem in unnamed)}
    stray = [path for path in files if path.suffix.lower() in SIDECARS and path not in told] if not tables else []
    unnamed += [Problem(path, "no picture of that name beside it", "not a picture") for path in stray]
    return pictures + beside, problems + unnamed, tables + sidecars


def _from_sidecars(
    found: Sequence[Path], files: Sequence[Path], tables: str
) -> tuple[list[Picture], list[Problem], list[Path]]:
    beside = _beside(found, files)
    lines: dict[Path, list[str]] = {}
    broken: dict[Path, str] = {}
    for path in dict.fromkeys(sidecar for own in beside.values() for sidecar in own):
        try:
            lines[path] = read_text(path).splitlines()
        except InputError as error:
            broken[path] = str(error).removeprefix(f"{path.parent}{os.sep}")
    pictures: list[Picture] = []
    problems = [Problem(path, reason) for path, reason in broken.items()]
    for path, sidecars in beside.items():
        captions = clean_captions([line for sidecar in sidecars for line in lines.get(sidecar, ())])
        if captions:
            pictures.append(Picture(path, captions, ""))
        elif torn := [broken[sidecar] for sidecar in sidecars if sidecar in broken]:
            problems.append(Problem(path, torn[0], "without caption", split=""))
        elif sidecars:
            reason = f"{sidecars[0].name} is empty; write what {path.name} shows, one caption a line"
            problems.append(Problem(path, reason, "without caption", split=""))
        else:
            missing = f"no caption file beside it; write {path.with_suffix('.txt').name}"
            reason = f"no line of {tables} names it" if tables else missing
            problems.append(Problem(path, reason, "without caption", split=""))
    return pictures, problems, list(lines)


def _beside(found: Sequence[Path], files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Of each picture its sidecars, .txt first: of its own name, else of the same with accents in another form."""
    alike: dict[str, list[Path]] = {}
    for path in sorted(files, key=lambda path: path.suffix.lower() != SIDECARS[0]):
        if path.suffix.lower() in SIDECARS:
            alike.setdefault(composed(path.with_suffix("")), []).append(path)
    beside: dict[Path, list[Path]] = {}
    for path in found:
        stem = path.with_suffix("")
        near = alike.get(composed(stem), [])
        beside[path] = [sidecar for sidecar in near if sidecar.with_suffix("") == stem] or near
    return beside
