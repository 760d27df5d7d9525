"""The ledger of a folder: every file on the disk with what becomes of it, and what to know of each picture.

Each file has one status, so that the counts add up to the files on the disk. Remarks are about pictures, overlap, and
take nothing away: a cropped or a duplicate picture is used.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentgen.data.alike import MEANING, find_alike
from latentgen.data.buckets import Buckets, keep_fitting
from latentgen.data.decode import BACKGROUND, Opener
from latentgen.data.folder import PICTURES, CaptionedFolder, is_hidden, walk
from latentgen.data.picture import Box, Picture, Problem, Stored
from latentgen.data.remote import as_told
from latentgen.data.survey import Facts, Progress, Survey

STATUSES = {
    "used": "pictures that are used",
    "description": "files that captions are read from",
    "container": "files that hold many pictures: each member or row is counted by itself",
    "without caption": "pictures that nothing describes: left out",
    "does not fit": "pictures that would be cut or enlarged more than the recipe allows: left out",
    "unreadable": "files that cannot be read or decoded: left out",
    "not a picture": "other files: not read",
    "hidden": "names that start with a dot: not read",
}
REMARKS = {
    "cropped": "the longer side is cut to a square, or to the shape of the bucket",
    "upscaled": "smaller than the size it is trained at: enlarged",
    "duplicate": "an earlier picture has the same pixels",
    "near duplicate": MEANING,
    "in two splits": "the picture that it equals, or nearly, is in another split",
    "several frames": "an animation or pages: the first is used",
    "transparent": "laid on the background",
    "caption cut": "a caption is longer than the text encoder's context",
    "named again": "described more than once: the first is used",
}
LEAST_LOST = 0.005  # of the area: below it a picture counts as whole
WORST_WORDS = 30
UNSEEN = Facts()
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Entry:
    """A file, or with `box` one picture of it. lost: the part of the area cut away; scale: of the side, above 1 is up.

    cut: how many captions are cut; longest: of its captions, in tokens, start and end included, 0 if not counted.
    """

    file: str
    status: str
    reason: str = ""
    box: Box | None = None
    captions: tuple[str, ...] = ()
    split: str = ""
    facts: Facts = UNSEEN
    lost: float = 0.0
    scale: float = 1.0
    duplicate_of: str = ""
    near: str = ""
    other_split: bool = False
    stored: Stored | None = None
    again: bool = False
    cut: int = 0
    longest: int = 0

    @property
    def remarks(self) -> tuple[str, ...]:
        """What there is to know of it, names from REMARKS."""
        holds = (
            self.lost >= LEAST_LOST,
            self.scale > 1,
            self.duplicate_of,
            self.near,
            self.other_split,
            self.facts.frames > 1,
            self.facts.transparent,
            self.cut,
            self.again,
        )
        return tuple(name for name, here in zip(REMARKS, holds, strict=True) if here)

    def words(self) -> str:
        """What there is to know of it, for people, on one line."""
        says = {
            "cropped": f"{self.lost:.0%} of {self.facts.width} x {self.facts.height} is lost",
            "upscaled": f"{self.scale:.2g} times, from {self.facts.width} x {self.facts.height}",
            "duplicate": f"same pixels as {self.duplicate_of}",
            "near duplicate": f"nearly {self.near}",
            "in two splits": f"it is in {self.split}",
            "several frames": f"the first of {self.facts.frames} frames",
            "transparent": f"mode {self.facts.mode}, laid on the background",
            "caption cut": f"{self.cut} of {len(self.captions)} captions cut, the longest has {self.longest} tokens",
            "named again": "named again",
        }
        return "; ".join([*([self.reason] if self.reason else []), *(says[name] for name in self.remarks)])

    def as_json(self) -> dict[str, Any]:
        """What differs from nothing to say."""
        seen = self.facts
        told: dict[str, Any] = {"file": self.file, "status": self.status, "reason": self.reason, "box": self.box}
        told |= {"split": self.split, "caption": (self.captions or ("",))[0], "captions": len(self.captions)}
        told |= {"width": seen.width, "height": seen.height, "mode": seen.mode, "remarks": self.remarks}
        told |= {"lost": round(self.lost, 4), "scale": round(self.scale, 4) if self.scale > 1 else 0}
        told |= {"duplicate_of": self.duplicate_of, "near": self.near, "captions_cut": self.cut}
        told |= {"frames": seen.frames if seen.frames > 1 else 0, "longest_caption": self.longest}
        return {name: value for name, value in told.items() if value}


@dataclass(frozen=True)
class Ledger:
    """Every file of `root`. size: of the square that pictures become, in pixels; None is as large as they are.

    context: tokens a caption may have, None where no tokenizer was at hand; split_words: (word, tokens, times) of the
    words that a tokenizer breaks into the most parts.
    """

    root: Path
    entries: tuple[Entry, ...]
    size: int | None = None
    background: str = BACKGROUND
    context: int | None = None
    split_words: tuple[tuple[str, int, int], ...] = ()

    @property
    def files(self) -> dict[str, int]:
        """How many files have each status; they add up to the files on the disk."""
        of = {entry.file: entry.status for entry in sorted(self.entries, key=lambda entry: entry.status == "used")}
        return {status: count for status in STATUSES if (count := sum(found == status for found in of.values()))}

    @property
    def pictures(self) -> int:
        """How many pictures are used; a file can hold several."""
        return sum(entry.status == "used" for entry in self.entries)

    @property
    def remarks(self) -> dict[str, int]:
        """How many pictures each remark is about."""
        counts = Counter(remark for entry in self.entries for remark in entry.remarks)
        return {remark: counts[remark] for remark in REMARKS if counts[remark]}

    def line(self) -> str:
        """The whole of it on one line."""
        files = ", ".join(f"{count} {status}" for status, count in self.files.items())
        remarks = ", ".join(f"{count} {remark}" for remark, count in self.remarks.items())
        return (
            f"{sum(self.files.values())} files: {files}; of {self.pictures} pictures {remarks or 'nothing to remark'}"
        )

    def as_json(self) -> str:
        """The ledger as a JSON file."""
        told = {
            "folder": as_told(self.root),
            "size": self.size,
            "background": self.background,
            "context": self.context,
            "total": sum(self.files.values()),
            "files": self.files,
            "pictures": self.pictures,
            "remarks": self.remarks,
            "meaning": {**STATUSES, **REMARKS},
            "words_split_most": [{"word": w, "tokens": n, "times": t} for w, n, t in self.split_words],
        }
        head = json.dumps(told, indent=1, ensure_ascii=False)[:-2]
        lines = ",\n".join(json.dumps(entry.as_json(), ensure_ascii=False) for entry in self.entries)
        return f'{head},\n "entries": [\n{lines}\n]\n}}\n'


def write_ledger(
    folder: CaptionedFolder,
    size: int | None = None,
    background: str = BACKGROUND,
    kept: Path | None = None,
    progress: Progress | None = None,
    buckets: Buckets | None = None,
) -> Ledger:
    """Looks at every file of a folder that was read. kept: a file to keep what was seen in, for the next time.

    buckets: pictures that fit none are left out and listed, and each other one is judged by its own.

    Raises InputError if `background` is no colour or `kept` cannot be written.
    """
    survey = Survey(folder.root, Opener(background), kept)
    facts = survey.facts(folder.pictures, progress)
    if buckets is not None:
        seen_of = dict(zip(folder.pictures, facts, strict=True))
        folder, _ = keep_fitting(folder, facts, buckets)
        facts = [seen_of[picture] for picture in folder.pictures]

    def with_pixels(indices: Sequence[int]) -> list[Facts]:
        return survey.with_pixels([folder.pictures[index] for index in indices])

    exact, near = find_alike(facts, with_pixels)
    survey.save()
    again = {(problem.path, problem.box) for problem in folder.problems if problem.kind == "named again"}
    entries: list[Entry] = []
    for index, (picture, seen) in enumerate(zip(folder.pictures, facts, strict=True)):
        entry = _picture_entry(folder.root, picture, seen, size, buckets)
        entry = replace(entry, again=(picture.path, picture.box) in again)
        other = exact.get(index, near.get(index))
        if other is not None:
            name = _name(folder.root, folder.pictures[other])
            alike = {"duplicate_of": name} if index in exact else {"near": name}
            apart = folder.pictures[other].split != picture.split
            entry = replace(entry, **alike, other_split=apart)  # type: ignore[arg-type]
        entries.append(entry)
    return Ledger(folder.root, (*entries, *_others(folder)), size, background)


def count_tokens(
    ledger: Ledger, lengths: Mapping[str, int], context: int, pieces: Callable[[Sequence[str]], Sequence[int]]
) -> Ledger:
    """The ledger with what a tokenizer does to the captions.

    lengths: of each caption in tokens, start and end included; pieces: of words, without.
    """
    entries = []
    times: Counter[str] = Counter()
    for entry in ledger.entries:
        if entry.status == "used":
            tokens = [lengths.get(caption, 0) for caption in entry.captions]
            entry = replace(entry, cut=sum(count > context for count in tokens), longest=max(tokens))
            times.update(word for caption in entry.captions for word in _WORD.findall(caption.lower()))
        entries.append(entry)
    words = sorted(times)
    parts = dict(zip(words, pieces(words), strict=True))
    worst = sorted((word for word in words if parts[word] > 2), key=lambda word: (-parts[word], -times[word], word))
    split_words = tuple((word, parts[word], times[word]) for word in worst[:WORST_WORDS])
    return replace(ledger, entries=tuple(entries), context=context, split_words=split_words)


def _name(root: Path, picture: Picture) -> str:
    name = picture.path.relative_to(root).as_posix()
    return f"{name} {list(picture.box)}" if picture.box else name


def _picture_entry(root: Path, picture: Picture, seen: Facts, size: int | None, buckets: Buckets | None) -> Entry:
    name = picture.path.relative_to(root).as_posix()
    entry = Entry(name, "used", "", picture.box, picture.captions, picture.split, seen, stored=picture.stored)
    if seen.error:
        return replace(entry, status="unreadable", reason=seen.error)
    if buckets is not None:
        fit = buckets.fit(seen.width, seen.height)
        return replace(entry, lost=fit.lost, scale=fit.scale)
    side = min(seen.width, seen.height)
    return replace(entry, lost=1 - side**2 / (seen.width * seen.height), scale=(size or side) / side)


def _others(folder: CaptionedFolder) -> list[Entry]:
    """The files that are no used picture, and the pictures that are left out of files that hold used ones."""
    taken = {picture.path for picture in folder.pictures}
    parts = {(picture.path, picture.box) for picture in folder.pictures}
    reasons: dict[Path, Problem] = {}
    left_out: dict[tuple[Path, Box | None], Problem] = {}
    for problem in folder.problems:
        if problem.kind == "does not fit" or (problem.box is not None and problem.kind == "without caption"):
            left_out.setdefault((problem.path, problem.box), problem)
        else:
            reasons.setdefault(problem.path, problem)
    described, containers = set(folder.descriptions), set(folder.containers)
    others: list[Entry] = []
    on_disk = folder.files if folder.files is not None else walk(folder.root)[0]
    inside = {*reasons, *described} if containers else set()  # members of containers
    inside |= {path for path, problem in reasons.items() if problem.kind == "unreadable"}  # links to nothing, say
    shown = taken | {path for path, _ in left_out}
    for path in sorted({*on_disk, *inside} - shown):
        relative = path.relative_to(folder.root)
        if is_hidden(relative) and path not in reasons:
            status, reason = "hidden", ""
        elif path in described:
            status, reason = "description", ""
        elif path in reasons:
            status, reason = reasons[path].kind, reasons[path].reason
        elif path in containers:
            status, reason = "container", ""
        elif path.suffix.lower() in PICTURES:
            status, reason = "without caption", "nothing describes it"
        else:
            status, reason = "not a picture", "neither a picture that is read nor a caption that is used"
        others.append(Entry(relative.as_posix(), status, reason))
    for (path, box), problem in left_out.items():
        if (path, box) not in parts:
            name = path.relative_to(folder.root).as_posix()
            others.append(Entry(name, problem.kind, problem.reason, box, stored=problem.stored))
    return others
