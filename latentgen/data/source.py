"""Captioned pictures from wherever people have them: a folder of files, tar shards, or what `datasets` saved."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from latentgen.data.folder import PICTURES, SOURCES, CaptionedFolder, in_splits, is_hidden, listing, read_files, walk
from latentgen.data.remote import Say, Store, address_of
from latentgen.data.rows import is_saved, read_rows
from latentgen.data.shards import PRESSED, TAR, expand, is_pattern, read_shards, tars_of
from latentgen.errors import InputError

_HUB = re.compile(r"(hf:/+.+|[\w.-]+/[\w.-]+)")


def _to_stderr(line: object) -> None:
    print(line, file=sys.stderr, flush=True)


def read_folder(root: Path, captions: str = "files", say: Say = _to_stderr, *, folders: bool = True) -> CaptionedFolder:
    """Reads the captions of a source; no picture is opened.

    root: a folder of pictures (see `data.folder`), a folder of tar shards, one tar or a brace pattern of them
    (shards/{000..012}.tar; see `data.shards`), the address of one or of such a pattern (https://…/{000..012}.tar; see
    `data.remote`), or a folder that `datasets` saved (`data.rows`). captions: "files", or "names" for those that are
    said by the names of the pictures. say: told what is fetched. folders: whether those named train, test, validation,
    valid or val are splits, where nothing else says the split of a picture.

    Raises InputError for a source that is missing, that cannot be read, or holds no captioned picture.
    """
    return in_splits(_read(Path(root), captions, say), folders)


def _read(root: Path, captions: str, say: Say) -> CaptionedFolder:
    if captions not in SOURCES:
        raise InputError(f"captions is {captions!r}; it can be {listing(SOURCES)}")
    address = address_of(str(root)) if not root.exists() else None
    if address is not None and is_pattern(address):
        store = Store(expand(address), say)
        return read_shards(_above([tar.place for tar in store.shards]), store.shards, captions)
    if is_pattern(str(root)) and not root.is_dir():
        tars = tars_of(str(root))
        return read_shards(_above(tars), tars, captions)
    if not root.exists() and _HUB.fullmatch(str(root)):
        raise InputError(
            f"{root} does not exist here, and no hub is reached from here; if it is a data set of a hub, save it where "
            "there is one (datasets.load_dataset(...).save_to_disk(folder)) and give that folder"
        )
    if address is not None:
        raise InputError(f"{address} is no tar shard; give them by name, as in https://host/shards/{{000..012}}.tar")
    if is_saved(root):
        if captions == "names":
            raise InputError(f"{root} holds rows, which have no names; leave captions at files")
        return read_rows(root)
    if root.is_dir():
        files, _ = walk(root)
        shown = [path for path in files if not is_hidden(path.relative_to(root))]
        tars = [path for path in shown if path.name.endswith(TAR)]
        pressed = any(path.name.endswith(PRESSED) for path in shown)
        if (tars or pressed) and not any(path.suffix.lower() in PICTURES for path in shown):
            return read_shards(root, tars, captions, [path for path in files if path not in set(tars)])
    return read_files(root, captions)


def _above(paths: Sequence[Path]) -> Path:
    """The deepest folder that all of them are in."""
    return Path(os.path.commonpath([path.parent for path in paths]))
