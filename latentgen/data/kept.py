"""Rows of kept arrays by what they were made of, so that of a changed set only the changed items are made anew.

Beside an array `NAME-….npy` of n rows stands `NAME-….keys`: n times KEY bytes, the digest of what each row came from.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentgen.durable import write_file

KEY = 16  # bytes of a digest
Rows = dict[bytes, tuple[np.ndarray, int]]  # digest -> an array, memory-mapped, and the row of it


def key_of(content: bytes | np.ndarray) -> bytes:
    """The digest of one item: its pixels, and their shape where it is not square; or its text in UTF-8."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()[:KEY]
    height, width = content.shape[:2]
    shape = b"" if height == width else f"{height} x {width};".encode()
    return hashlib.sha256(shape + np.ascontiguousarray(content).tobytes()).digest()[:KEY]


def write_keys(target: Path, keys: Sequence[bytes]) -> None:
    """Says of the array that is, or will be, at `target` what each of its rows was made of."""
    write_file(target.with_suffix(".keys"), b"".join(keys))


def known_rows(folder: Path, name: str, shape: tuple[int, ...], dtype: type) -> Rows:
    """The rows of every array `name` (a pattern) in a folder, the latest first; shape, dtype: of a row.

    An array without its keys, or of another shape, is passed over.
    """
    found: Rows = {}
    paths = [(path.stat().st_mtime_ns, path) for path in folder.glob(f"{name}.npy")]
    for _, path in sorted(paths, reverse=True):
        try:
            keys = path.with_suffix(".keys").read_bytes()
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            continue
        if array.shape[1:] == shape and array.dtype == dtype and len(keys) == KEY * len(array):
            for row in range(len(array)):
                found.setdefault(keys[KEY * row : KEY * (row + 1)], (array, row))
    return found
