"""The pixels of pictures as one array, decoded once and kept on the disk under a key of their content."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from latentgen.data.decode import BACKGROUND, CannotDecode, Opener
from latentgen.data.folder import CaptionedFolder
from latentgen.data.kept import KEY, known_rows, write_keys
from latentgen.data.picture import Picture, Problem
from latentgen.errors import InputError

TRANSFORM = (
    "upright, on white, 8-bit RGB, Lanczos to cover, centre crop; 3"  # part of the cache key: change both together
)
ROWS_A_WRITE = 256  # pictures decoded between two writes of the cache: bounds the memory at 256 * size**2 * 3 bytes
Shape = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Pixels:
    """Decoded pictures: `array` (N, height, width, 3) uint8, memory-mapped, read-only; row i is `pictures[i]`."""

    array: np.ndarray
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]


def load_pixels(
    pictures: CaptionedFolder | Sequence[Picture],
    size: int | tuple[int, int],
    cache: Path,
    background: str = BACKGROUND,
) -> Pixels:
    """Decodes each picture to (height, width, 3) uint8 RGB, once: the array is kept in the folder `cache`.

    size: (width, height) in pixels, or the side of a square.

    A picture is turned upright (EXIF), brought to sRGB from its colour profile, laid on `background` if transparent,
    brought to 8-bit RGB, resized with Lanczos to cover that size, and centre-cropped. The cache is keyed by the bytes
    of the files, their order, the transform and the size, never by names or dates; of a set that has changed only what
    is new is decoded. A picture that cannot be read costs a line in `problems`, not the run.

    Raises InputError if `background` is no colour, if no picture is given or readable, or if the cache cannot be
    written.
    """
    chosen = pictures.pictures if isinstance(pictures, CaptionedFolder) else tuple(pictures)
    shape = (size, size) if isinstance(size, int) else size
    if min(shape) < 1:
        raise InputError(f"a picture size of {size} is no size; give 1 or more pixels")
    if not chosen:
        raise InputError("there are no pictures to load; give at least one")
    cache, opener = Path(cache), Opener(background)
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        whole, keys = _keys(chosen, shape, opener, pool)
        target = cache / f"{whole}.npy"
        kept = _open(target, len(chosen), shape)
        if kept is not None and any(not isinstance(_try_decode(chosen[k], shape, opener), str) for k in kept[1]):
            kept = None  # what kept a picture from being read lay outside it, and is gone
        if kept is None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                _decode_all(chosen, keys, shape, target, opener, pool)
            except OSError as error:
                raise InputError(
                    f"cannot write the pixel cache {cache}: {error.strerror or error}; free space or name another place"
                ) from error
            kept = _open(target, len(chosen), shape)
    if kept is None:
        raise InputError(f"the pixel cache {target} was changed while it was written; run again")
    array, unreadable = kept
    problems = tuple(Problem(chosen[index].path, reason) for index, reason in unreadable.items())
    return Pixels(array, tuple(p for index, p in enumerate(chosen) if index not in unreadable), problems)


def _keys(pictures: Sequence[Picture], shape: Shape, opener: Opener, pool: Executor) -> tuple[str, list[bytes]]:
    """What names the array as a whole, and what each picture's row is made of."""
    ground = "" if opener.colour == (255, 255, 255) else f"; on {opener.colour}"
    width, height = shape
    size = f"{width}" if width == height else f"{width} x {height}"
    digest = hashlib.sha256(f"{TRANSFORM}; {size}{ground}".encode())
    each = digest.copy()
    keys: list[bytes] = []
    files = {picture.path: picture for picture in pictures}
    content = dict(zip(files, pool.map(_content, files.values()), strict=True))
    for picture in pictures:
        told = content[picture.path] + (repr(picture.box).encode() if picture.box else b"")
        digest.update(told)
        own = each.copy()
        own.update(told)
        keys.append(own.digest()[:KEY])
    return digest.hexdigest()[:32], keys


def _content(picture: Picture) -> bytes:
    """What its file is known by; one that cannot be read by the reason, so that it is decoded anew once it can."""
    try:
        return picture.content()
    except OSError as error:
        return hashlib.sha256(f"unreadable: {error.strerror}".encode()).digest()


def _open(target: Path, count: int, shape: Shape) -> tuple[np.ndarray, dict[int, str]] | None:
    """The cached array (rows, height, width, 3), and by index why pictures are left out; None if it is not there."""
    try:
        unreadable = {int(index): str(reason) for index, reason in json.loads(_reasons(target).read_text()).items()}
        array: np.ndarray = np.load(target, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, AttributeError):
        return None
    whole = array.shape == (count - len(unreadable), *shape[::-1], 3) and array.dtype == np.uint8
    return (array, unreadable) if whole else None


def _reasons(target: Path) -> Path:
    return target.with_suffix(".json")


def _decode_all(
    pictures: Sequence[Picture], keys: Sequence[bytes], shape: Shape, target: Path, opener: Opener, pool: Executor
) -> None:
    """Writes `target` and, first, the reasons of the pictures left out; each aside and renamed, the array last."""
    unreadable: dict[int, str] = {}
    known = known_rows(target.parent, "*", (*shape[::-1], 3), np.uint8)

    def decode(picture: Picture, key: bytes) -> np.ndarray | str:
        if key in known:
            array, row = known[key]
            return np.asarray(array[row])
        return _try_decode(picture, shape, opener)

    def write_rows(file: BinaryIO) -> None:
        _write_header(file, len(pictures), shape)
        for start in range(0, len(pictures), ROWS_A_WRITE):
            rows = pictures[start : start + ROWS_A_WRITE]
            for index, decoded in enumerate(pool.map(decode, rows, keys[start:]), start=start):
                if isinstance(decoded, str):
                    unreadable[index] = decoded
                else:
                    file.write(decoded.tobytes())
        if len(unreadable) == len(pictures):
            raise InputError(
                f"none of the {len(pictures)} pictures can be read, the first is {pictures[0].path}: {unreadable[0]}; "
                "give PNG, JPEG or WebP files"
            )
        file.seek(0)
        _write_header(file, len(pictures) - len(unreadable), shape)
        file.flush()
        os.fsync(file.fileno())
        _write_aside(_reasons(target), lambda reasons: reasons.write(json.dumps(unreadable).encode()))
        write_keys(target, [key for index, key in enumerate(keys) if index not in unreadable])

    _write_aside(target, write_rows)


def _write_aside(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a file beside `target`, then renames it into place; on any error nothing is left."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
        aside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def _write_header(file: BinaryIO, rows: int, shape: Shape) -> None:
    """A NumPy 1.0 header of 128 bytes whatever the count of rows, so that it can be written again at the end."""
    text = (
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rows}, {shape[1]}, {shape[0]}, 3), }}".ljust(117) + "\n"
    )
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1"))


def _try_decode(picture: Picture, shape: Shape, opener: Opener) -> np.ndarray | str:
    """The picture as (height, width, 3) uint8, or the reason why it cannot be read."""
    try:
        return np.asarray(ImageOps.fit(opener.open(picture, 2 * max(shape)).image, shape, Image.Resampling.LANCZOS))
    except CannotDecode as error:
        return str(error)
