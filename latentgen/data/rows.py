"""Captioned pictures in a folder that Hugging Face `datasets` saved: rows of Arrow tables, read where they stand.

One column holds pictures (the feature `Image`); captions are in `text`, `caption` or `captions`, as in a metadata
table, and every other column is kept. Of a DatasetDict each part is a split of its own name.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentgen.data.folder import CaptionedFolder
from latentgen.data.metadata import clean_captions, entry_captions
from latentgen.data.picture import Picture, Problem, content_of, stamp_of
from latentgen.errors import InputError

MARKS = ("dataset_dict.json", "state.json")  # one of them stands in a folder that save_to_disk wrote
CAPTIONS = ("text", "caption", "captions")


@dataclass(frozen=True)
class Row:
    """The picture of one row. table: the rows, pictures as bytes; number: among them."""

    container: Path
    column: str
    number: int
    table: Any = field(compare=False, repr=False)

    @property
    def stamp(self) -> list[int]:
        """What changes when its table does."""
        return stamp_of(self.container)

    def content(self) -> bytes:
        """What its bytes are known by."""
        return content_of(self.read())

    def read(self) -> bytes:
        """The bytes of the picture's file. Raises OSError, also where the row holds none."""
        cell = self.table[self.number][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise OSError("its row holds no picture")
        data: bytes | None = cell["bytes"]
        return data if data is not None else Path(cell["path"]).read_bytes()


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return dataset or (folder / "dataset_dict.json").is_file()


def read_rows(root: Path) -> CaptionedFolder:
    """The rows of a folder written by `save_to_disk`, split after split.

    Raises InputError where `datasets` is not installed or cannot read it, and where a column is missing or unclear.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f'{root} was saved by datasets; to read it, pip install "latentgen[datasets]"') from None
    try:
        saved = datasets.load_from_disk(str(root))
    except Exception as error:  # whatever lies below raises on a broken folder
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{root} cannot be read by datasets ({words}); save it anew") from None
    parts = dict(saved) if isinstance(saved, datasets.DatasetDict) else {None: saved}
    pictures: list[Picture] = []
    problems: list[Problem] = []
    tables: list[Path] = []
    for split, part in parts.items():
        column = _picture_column(root, part.features, datasets.Image)
        table = part.cast_column(column, datasets.Image(decode=False))
        rest = table.remove_columns([name for name in part.features if name == column])
        tables += [Path(file["filename"]) for file in part.cache_files]
        for (path, container), number, columns in zip(_names(root, part), range(len(part)), rest, strict=True):
            told = {name: value for name, value in columns.items() if value is not None}
            said = clean_captions(entry_captions(told, path.name, str(path.parent)))
            own = told.pop("split", None)
            place, part_of = Row(container, column, number, table), split or (own if isinstance(own, str) else "train")
            if said:
                pictures.append(Picture(path, said, part_of, told, None, place))
            else:
                problems.append(Problem(path, "its caption is empty", "without caption", None, place, part_of))
    if not pictures:
        raise InputError(f"{root} holds no row with a caption; fill the column text")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    said_by = [path for path in files if path.name in (*MARKS, "dataset_info.json")]
    return CaptionedFolder(root, tuple(pictures), tuple(problems), tuple(said_by), tuple(tables), tuple(files))


def _picture_column(root: Path, features: Any, image: type) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, image)]
    if not found:
        raise InputError(f"{root} has no column of pictures, only {', '.join(features)}; cast one to datasets.Image()")
    if len(found) > 1 and "image" not in found:
        raise InputError(f"{root} has several columns of pictures: {', '.join(found)}; name the right one image")
    if not set(CAPTIONS) & set(features):
        raise InputError(f"{root} has no column of captions, only {', '.join(features)}; name it text")
    return "image" if "image" in found else found[0]


def _names(root: Path, part: Any) -> Iterator[tuple[Path, Path]]:
    """Of each row its name, table and number in it (counted from 0), and the table's file."""
    import pyarrow

    for cached in part.cache_files:
        file = root / Path(cached["filename"]).relative_to(os.path.normpath(root.absolute()))  # as datasets names it
        with pyarrow.memory_map(str(file)) as source:
            count = sum(batch.num_rows for batch in pyarrow.ipc.open_stream(source))
        for row in range(count):
            yield file / f"row {row}", file
