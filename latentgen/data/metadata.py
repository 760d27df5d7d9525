"""Captions in a table: metadata.jsonl, .csv or .parquet, one picture a row, `file_name` relative to the table's folder.

Columns: `text` (or `caption`), `captions` (several), `split`, `box`; any other is kept as an attribute.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from latentgen.data.names import Found
from latentgen.data.picture import Box, Picture, Problem
from latentgen.errors import InputError

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}  # of a .csv; some spreadsheets write the second
Row = tuple[str, dict[str, Any]]  # where it stands, for people; its columns


def read_metadata(metadata: Path, found: Sequence[Path]) -> tuple[list[Picture], list[Problem]]:
    """The pictures a table names, in its order, and the rows of it that are not used. found: the pictures there are.

    Raises InputError for a table that cannot be read, a column of the wrong kind, and a row that names a missing
    picture.
    """
    known = Found(found)
    pictures: dict[tuple[Path, Box | None], Picture] = {}
    problems: list[Problem] = []
    missing: list[tuple[str, str]] = []
    rows = 0
    for where, columns in _rows(metadata):
        rows += 1
        named = _entry(columns, metadata.parent, f"{metadata} {where}")
        place = _place(named.path, metadata.parent, known, f"{metadata} {where}")
        if place is None:
            missing.append((where, str(named.path.relative_to(metadata.parent))))
            continue
        picture = replace(named, path=place)
        if (picture.path, picture.box) in pictures:
            again = f"named again in {metadata.name} {where}; the first entry is used"
            problems.append(Problem(picture.path, again, "named again", picture.box))
        elif not picture.captions:
            reason = f'{metadata.name} {where}: {picture.path.name} has no caption; write "text": "what it shows"'
            problems.append(Problem(picture.path, reason, "without caption", picture.box, split=picture.split))
        else:
            pictures[picture.path, picture.box] = picture
    if missing:
        where, name = missing[0]
        count = f"{len(missing)} of {rows} entries name missing pictures"
        raise InputError(f"{metadata} {where}: {name} does not exist ({count}); put it there or take the line out")
    return list(pictures.values()), problems


def clean_captions(lines: Sequence[str]) -> tuple[str, ...]:
    """Stripped, without empty ones and repetitions, in order."""
    return tuple(dict.fromkeys(caption for line in lines if (caption := line.strip())))


def read_text(path: Path) -> str:
    """A text file, its lines ended by newlines. Raises InputError for one that is not UTF-8."""
    try:
        text = decoded(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); make it readable") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decoded(data: bytes, name: Path | str) -> str:
    """The text of a file, without a byte order mark. Raises InputError for bytes that are not UTF-8."""
    start = data.find(0)  # in no text, but at every letter of UTF-16
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        start = error.start if start < 0 else min(start, error.start)
    if start >= 0:
        line = data[:start].count(b"\n") + 1
        raise InputError(f"{name} is not UTF-8 text (line {line}, byte {start}); save it as UTF-8")
    return text.removeprefix("\ufeff")


def _rows(metadata: Path) -> Iterator[Row]:
    return {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[metadata.suffix](metadata)


def _json_rows(metadata: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(metadata).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{metadata} line {number} is not JSON ({error.msg}); write one JSON object a line"
            ) from None
        if not isinstance(columns, dict):
            raise InputError(f'{metadata} line {number} is not a JSON object; write {{"file_name": ..., "text": ...}}')
        yield f"line {number}", columns


def _csv_rows(metadata: Path) -> Iterator[Row]:
    """Cells are text; of `captions` and `box` a cell that starts with a bracket is a JSON list."""
    text = read_text(metadata)
    reader: csv.DictReader[str] | None = None
    try:
        between = _separator(text)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=between, strict=True, skipinitialspace=True)
        _check_columns(metadata, reader.fieldnames or ())
        for cells in reader:
            where = f"line {reader.line_num}"
            if None in cells:
                raise InputError(
                    f"{metadata} {where} has more cells than columns; write {SEPARATORS[between]} in quotes: "
                    f'"red{between} round"'
                )
            columns: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
            for name in {"captions", "box"} & columns.keys():
                columns[name] = _listed(columns[name], f"{metadata} {where}: {name}")
            yield where, columns
    except csv.Error as error:
        number = reader.reader.line_num if reader is not None else 1
        raise InputError(f"{metadata} line {number} is not CSV ({error}); save it as comma-separated") from None


def _separator(text: str) -> str:
    """What stands between the names of the columns; a comma where nothing gives a column of files."""
    head = text.partition("\n")[0]
    names = {between: next(csv.reader([head], delimiter=between, skipinitialspace=True), []) for between in SEPARATORS}
    return next((between for between in SEPARATORS if "file_name" in names[between]), ",")


def _listed(cell: str, what: str) -> Any:
    if not cell.lstrip().startswith("["):
        return [cell]
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise InputError(f"{what} is not a JSON list ({error.msg}); write a list as JSON") from None


def _parquet_rows(metadata: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{metadata} needs the package pyarrow to be read; pip install pyarrow") from None
    try:
        with ParquetFile(metadata) as table:
            _check_columns(metadata, table.schema_arrow.names)
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            for number, columns in enumerate(rows, start=1):
                yield f"row {number}", {name: value for name, value in columns.items() if value is not None}
    except (ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{metadata} cannot be read as parquet ({why}); write it anew") from None


def _check_columns(metadata: Path, names: Sequence[str]) -> None:
    if "file_name" not in names:
        raise InputError(f"{metadata} has no column file_name, only {', '.join(names) or 'none'}; name it so")


def _entry(columns: dict[str, Any], root: Path, where: str) -> Picture:
    """One row as a Picture, whose captions may be none and whose split may be ""; `where` names file and line."""
    name = columns.pop("file_name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f'{where} has no file_name; write "file_name": "images/cat.png"')
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _outside(name, root, where)
    captions = clean_captions(entry_captions(columns, name, where))
    split = columns.pop("split", None)
    if not isinstance(split, str | None):
        raise InputError(f'{where}: split of {name} is not a string; write "split": "train"')
    box = _box(columns.pop("box", None), f"{where}: box of {name}")
    return Picture(root / name, captions, split or "", columns, box)


def _place(named: Path, root: Path, known: Found, where: str) -> Path | None:
    """The file that a row means: as it is named, else by Windows' folders, else with accents or capitals otherwise."""
    if (known_as := _known(named, known)) is not None:
        return known_as
    name = str(named.relative_to(root))
    if "\\" in name:
        windows = PureWindowsPath(name)
        if windows.anchor or ".." in windows.parts:
            raise _outside(name, root, where)
        return _known(root.joinpath(*windows.parts), known)
    return None


def _known(named: Path, known: Found) -> Path | None:
    """A file by its own spelling; whether it is there is asked last, as some file systems say so of any spelling."""
    if named in known:
        return named
    return known.alike(named) or (named if named.is_file() else None)


def _outside(name: str, root: Path, where: str) -> InputError:
    return InputError(f"{where}: {name} lies outside the folder; give a path relative to {root}")


def entry_captions(columns: dict[str, Any], name: str, where: str) -> list[str]:
    """Takes what is said of one picture out of its columns: `text`, `caption`, then `captions`, as it stands there."""
    said: list[str] = []
    for column in ("text", "caption"):
        text = columns.pop(column, None)
        if not isinstance(text, str | None):
            raise InputError(f'{where}: {column} of {name} is not a string; write "{column}": "a cat"')
        said.append(text or "")
    more = columns.pop("captions", None)
    if more is not None and not (isinstance(more, list) and all(isinstance(caption, str) for caption in more)):
        raise InputError(f'{where}: captions of {name} is not a list of strings; write "captions": ["a cat", "cat"]')
    said += more or []
    if any(is_torn(text) for text in said):
        raise InputError(f"{where}: a caption of {name} holds half a character (a lone surrogate); write it anew")
    return said


def is_torn(text: str) -> bool:
    """Whether a text holds surrogates, which are no characters: of bytes that are not UTF-8, or half of a pair."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _box(value: Any, what: str) -> Box | None:
    if value is None:
        return None
    whole = isinstance(value, list) and len(value) == 4 and all(type(side) is int and side >= 0 for side in value)
    if not whole or not (value[0] < value[2] and value[1] < value[3]):
        raise InputError(f"{what} is no part of a picture; write [left, upper, right, lower] in pixels")
    return (value[0], value[1], value[2], value[3])
