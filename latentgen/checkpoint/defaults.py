"""A weights folder is given other defaults, and other weights of its U-Net: whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentgen.checkpoint.folder import DEFAULTS, read_manifest
from latentgen.checkpoint.single import open_checkpoint
from latentgen.durable import MANIFEST, write_file, write_folder
from latentgen.errors import InputError


def write_defaults(
    folder: Path,
    defaults: Mapping[str, Any],
    change: Callable[[Path], None] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Make `defaults` (as `Pipeline.__call__` names them) what the folder takes where nothing is said.

    What else latentgen.json says stays, and `notes` join it. A default of None is taken away. change: called on a copy
    of the folder that lies aside, and may replace files of it (they are links: put new ones in their place, write into
    none). The manifest is made anew and the folder swapped in at once; it must verify before. Raises InputError.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.folder.is_file():
        raise InputError(
            f"{folder} is a single file, whose defaults are not rewritten; make a folder of it first "
            f"(latentgen convert {folder} FOLDER)"
        )
    old = dict(checkpoint.extras)
    merged = {**(old.get("defaults") or {}), **defaults}
    extras = {**old, **(notes or {}), "defaults": {key: value for key, value in merged.items() if value is not None}}
    text = (json.dumps(extras, indent=2) + "\n").encode()
    listed = read_manifest(folder)["files"]
    if not listed:  # somebody else's folder: nothing there but this file is ours
        if change is not None:
            raise InputError(f"{folder} has no {MANIFEST}, so its weights are not replaced; only defaults are written")
        write_file(folder / DEFAULTS, text)
        return folder

    def write(aside: Path) -> None:
        for name in listed:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            if name != DEFAULTS:
                _link(folder / name, aside / name)
        (aside / DEFAULTS).write_bytes(text)
        if change is not None:
            change(aside)

    return write_folder(folder, write)


def _link(old: Path, new: Path) -> None:
    """The same bytes in another place, without writing them again where the file system can do that."""
    try:
        os.link(old.resolve(), new)
    except OSError:
        shutil.copy2(old, new)
