"""Captioned pictures in tar shards, in WebDataset's form: members of one key are one sample (0001.jpg, 0001.txt).

A member's key is its name up to the first dot of its last part, the rest is what it is: `jpg`, `txt`, `json`. Captions
come from the .txt or .caption member (one a line) and from the .json one (`text`, `caption`, `captions`; `split` and
every other column as in a metadata table). Members are read where they stand in the tar, so that nothing is unpacked.
Every member is used or listed; a broken description costs its own sample, not the run. Shards at an address are fetched
when their members are read (`data.remote`).
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentgen.data.folder import PICTURES, SIDECARS, CaptionedFolder, caption_of_name, is_hidden
from latentgen.data.metadata import clean_captions, decoded, entry_captions
from latentgen.data.picture import PROFILED, Picture, Problem, content_of, stamp_of
from latentgen.data.remote import RemoteTar, as_told
from latentgen.errors import InputError

TAR, PRESSED = ".tar", (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_KEY = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")


@dataclass(frozen=True)
class Member:
    """A stretch of an uncompressed tar: the content of one member."""

    tar: Path | RemoteTar
    offset: int
    length: int
    known: str = ""  # its content, in hex
    text: str | None = field(default=None, repr=False)  # its bytes, each a character, of what captions are in

    @property
    def container(self) -> Path:
        """The path of the tar, or the address as a path."""
        return self.tar if isinstance(self.tar, Path) else self.tar.place

    @property
    def stamp(self) -> list[int]:
        """What changes when the tar does."""
        return stamp_of(self.tar) if isinstance(self.tar, Path) else self.tar.stamp

    def read(self) -> bytes:
        """Its bytes. Raises OSError where the tar has become shorter, InputError where it cannot be fetched."""
        if self.text is not None:
            return self.text.encode("latin-1")
        file = self.tar.open("rb") if isinstance(self.tar, Path) else self.tar.store.open(self.tar)
        with file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            raise OSError(f"{self.tar.name} ends before its member does")
        return data

    def content(self) -> bytes:
        """What its bytes are known by, without reading them where it is written down."""
        return bytes.fromhex(self.known) if self.known else content_of(self.read())


@dataclass
class _Sample:
    """The members of one key: (name below the tar, place) each."""

    pictures: list[tuple[Path, Member]] = field(default_factory=list)
    texts: list[tuple[Path, Member]] = field(default_factory=list)
    tables: list[tuple[Path, Member]] = field(default_factory=list)


@dataclass
class _Read:
    """What is found on the way."""

    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    descriptions: list[Path] = field(default_factory=list)

    def refuse(self, path: Path, reason: str, kind: Any, **picture: Any) -> None:
        self.problems.append(Problem(path, reason, kind, **picture))


def is_pattern(name: str) -> bool:
    """Whether a source is tars by name: one of them, or a brace pattern such as shards/{000..012}.tar."""
    return name.endswith(TAR) or ("{" in name and "}" in name and name.endswith(PRESSED))


def expand(pattern: str) -> list[str]:
    """The names that a brace pattern stands for, in order."""
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise InputError(f'{pattern} is a pattern, which needs pip install "latentgen[shards]"') from None
    try:
        return list(braceexpand(pattern))
    except ValueError as error:  # its UnbalancedBracesError
        raise InputError(f"{pattern} is no pattern ({error}); write as in shards/{{000..012}}.tar") from None


def tars_of(pattern: str) -> list[Path]:
    """The tars that a brace pattern names, in order. Raises InputError for those that are missing."""
    paths = [Path(name) for name in expand(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" ({len(missing)} of {len(paths)} are missing)" if len(paths) > 1 else ""
        raise InputError(f"{missing[0]} does not exist{more}; give tars that are there, or their folder")
    return paths


def read_shards(
    root: Path, tars: Sequence[Path] | Sequence[RemoteTar], captions: str, others: Sequence[Path] = ()
) -> CaptionedFolder:
    """The samples of tars, in order. root: the folder their names are told relative to; captions: as `read_folder`.

    others: files beside them that are no tars, to be listed. Raises InputError where no sample can be used.
    """
    read = _Read()
    for tar in tars:
        for key, sample in _samples(tar, read):
            _judge(root, key, sample, captions, read)
    for path in (path for path in others if not is_hidden(path.relative_to(root))):
        why = "compressed: members cannot be read where they stand; unpack it to .tar"
        pressed = path.name.endswith(PRESSED)
        read.refuse(path, why if pressed else "no tar shard", "unreadable" if pressed else "not a picture")
    if not read.pictures:
        first = f" ({read.problems[0].path}: {read.problems[0].reason})" if read.problems else ""
        raise InputError(
            f"{as_told(root)} holds {len(tars)} tar shards but no captioned pictures{first}; put 0001.jpg and 0001.txt "
            "or 0001.json into them"
        )
    places = tuple(tar if isinstance(tar, Path) else tar.place for tar in tars)
    found = (tuple(read.pictures), tuple(read.problems), tuple(read.descriptions))
    return CaptionedFolder(root, *found, places, (*places, *others))


def _samples(tar: Path | RemoteTar, read: _Read) -> Iterator[tuple[str, _Sample]]:
    """The members of a tar grouped by key, keys in the order met; what belongs to none is listed."""
    place = tar if isinstance(tar, Path) else tar.place
    samples: dict[str, _Sample] = {}
    seen: dict[Path, int] = {}
    for name, kind, member in _members(tar, read):
        path = place / name
        seen[path] = seen.get(path, 0) + 1
        if seen[path] > 1:
            again = path.with_name(f"{path.name}#{seen[path]}")
            read.refuse(again, f"{tar.name} holds {name} more than once; the first is used", "not a picture")
            continue
        parts = _KEY.fullmatch(name)
        if kind:
            read.refuse(path, kind, "not a picture")
        elif is_hidden(Path(name)):
            read.refuse(path, "its name starts with a dot", "hidden")
        elif parts is None or path.suffix.lower() not in (*PICTURES, *SIDECARS, ".json"):
            read.refuse(path, "neither a picture that is read nor a caption", "not a picture")
        else:
            sample = samples.setdefault(parts[1], _Sample())
            text, table = path.suffix.lower() in SIDECARS, path.suffix.lower() == ".json"
            (sample.texts if text else sample.tables if table else sample.pictures).append((path, member))
    yield from samples.items()


def _members(tar: Path | RemoteTar, read: _Read) -> Iterator[tuple[str, str, Member]]:
    """Each member's name, why it is no file ("" if it is one), and its place; a tar that is cut is listed itself."""
    count = 0
    try:
        rows = _scan(tar) if isinstance(tar, Path) else _written_down(tar)
        for name, why, *place in rows:
            count += 1
            yield name, why, Member(tar, *place)
    except InputError:  # one that cannot be fetched: all of its pictures would be missing
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        rest = f"after {count} members, which are used" if count else "at its start"
        broken = f"is no whole, uncompressed tar ({error}, {rest}); write it anew"
        read.refuse(tar if isinstance(tar, Path) else tar.place, broken, "unreadable")


def _scan(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Name, why it is no file, first byte and length of each member. Raises where the tar is broken."""
    size = path.stat().st_size
    with tarfile.open(path, "r:") as file:
        while (info := file.next()) is not None:
            if info.isdir():
                continue
            if info.offset_data + info.size > size:
                raise tarfile.ReadError("unexpected end of data")
            why = "" if info.isreg() else "a link or a device, not a file"
            yield info.name.removeprefix("./").lstrip("/"), why, info.offset_data, info.size


def _written_down(tar: RemoteTar) -> Iterator[list[Any]]:
    """As `_scan`, and the content and text of each member: the shard is fetched only where it was never listed."""
    told = tar.listed(_list)
    unknown = "" if "profiles" in told else PROFILED.hex()  # listed when nobody looked whether there are any
    for *place, content, text in told["members"]:
        yield [*place, content + unknown, text]
    if told["broken"]:
        raise tarfile.ReadError(told["broken"])


def _list(path: Path) -> dict[str, Any]:
    members: list[list[Any]] = []
    broken = ""
    with path.open("rb") as file:
        try:
            for name, why, offset, length in _scan(path):
                file.seek(offset)
                data = file.read(length)
                said = Path(name).suffix.lower() in (*SIDECARS, ".json") and not why
                text = data.decode("latin-1") if said else None
                members.append([name, why, offset, length, content_of(data).hex(), text])
        except (tarfile.TarError, OSError, ValueError) as error:
            broken = str(error)
    return {"members": members, "broken": broken, "profiles": True}


def _judge(root: Path, key: str, sample: _Sample, captions: str, read: _Read) -> None:
    """One sample becomes a picture, or each of its members is listed."""
    if not sample.pictures:
        for path, _ in (*sample.texts, *sample.tables):
            read.refuse(path, f"no picture has its key {key}", "not a picture")
        return
    (path, member), *more = sample.pictures
    for other, _ in more:
        read.refuse(other, f"a second picture of {key}; {path.name} is used", "not a picture")
    lines, columns, why = _described(sample, read)
    said = clean_captions([caption_of_name(Path(key).name)] if captions == "names" else lines)
    split = columns.pop("split", None) or ""
    if said:
        read.pictures.append(Picture(path, said, split, columns, stored=member))
    else:
        missing = why or f"no caption has its key {key}; add {Path(key).name}.txt"
        reason = "its name holds no words" if captions == "names" else missing
        read.refuse(path, reason, "without caption", stored=member, split=split)


def _described(sample: _Sample, read: _Read) -> tuple[list[str], dict[str, Any], str]:
    """Captions, other columns, and what was wrong with the last member that could not be read."""
    lines: list[str] = []
    columns: dict[str, Any] = {}
    why = ""
    for path, member in (*sample.texts, *sample.tables):
        try:
            text = decoded(member.read(), path.name)
            if path.suffix.lower() == ".json":
                found = json.loads(text)
                if not isinstance(found, dict):
                    raise InputError(f"{path.name} is not a JSON object")
                lines += entry_captions(found, path.name, "json")
                if not isinstance(found.get("split"), str | None):
                    raise InputError(f"split in {path.name} is not a string")
                columns |= {name: value for name, value in found.items() if value is not None}
            else:
                lines += text.splitlines()
            read.descriptions.append(path)
        except (ValueError, OSError) as error:  # of the first are errors of JSON, and those for people
            why = f"{path.name} is not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
            read.refuse(path, why, "unreadable")
    return lines, columns, why
