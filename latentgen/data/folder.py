"""A folder of captioned pictures: reading it with nothing silent, and its pixels, decoded once and kept.

A folder is either described by `metadata.jsonl` (one JSON object a line: `file_name`, `text`, optionally `captions`,
`split`, `box` and any other column) or by a sidecar beside each picture (`cat.txt` or `cat.caption` for `cat.png`, one
caption a line). A `box` ([left, upper, right, lower], in pixels) says that the picture is that part of its file, so
that many small ones can lie in one sheet. What is wrong with the description is an error; what is merely unused (a
picture no line names, a file that cannot be decoded) is a `Problem`, so that every picture found is either used or
listed with the reason.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from latentgen.errors import InputError

METADATA = "metadata.jsonl"
SIDECARS = (".txt", ".caption")
PICTURES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
TRANSFORM = (
    "upright, on white, 8-bit RGB, Lanczos to cover, centre crop; 1"  # part of the cache key: change both together
)
Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels of the file
SHEETS_HELD = 4  # decoded files kept at hand for the pictures that lie in them
ROWS_A_WRITE = 256  # pictures decoded between two writes of the cache: bounds the memory at 256 * size**2 * 3 bytes


@dataclass(frozen=True)
class Picture:
    """One picture and what is said of it; the captions are non-empty, the first is the main one.

    box: the part of the file that it is; None is all of it.
    """

    path: Path
    captions: tuple[str, ...]
    split: str = "train"
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    box: Box | None = None


@dataclass(frozen=True)
class Problem:
    """A file that is not used, and why, in words for people."""

    path: Path
    reason: str


@dataclass(frozen=True)
class CaptionedFolder:
    """The pictures of one folder in the order of its description, and the files in it that are not used."""

    root: Path
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]

    def select(self, split: str) -> tuple[Picture, ...]:
        """The pictures of one split ("train", "test", ...), in order; empty if the folder has no such split."""
        return tuple(picture for picture in self.pictures if picture.split == split)


@dataclass(frozen=True)
class Pixels:
    """Decoded pictures: `array` (N, size, size, 3) uint8, memory-mapped, read-only; row i is `pictures[i]`."""

    array: np.ndarray
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]


def read_folder(root: Path) -> CaptionedFolder:
    """Reads the captions of the folder `root`; no picture is opened.

    Raises InputError for a folder that is missing or holds no pictures, a metadata line that is no JSON object or has
    columns of the wrong kind, an entry that names a missing picture, and an entry without a caption.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}; give a folder of pictures with {METADATA} or .txt captions beside them")
    files = sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path.relative_to(root)))
    found = [path for path in files if path.suffix.lower() in PICTURES]
    metadata = root / METADATA
    if not found:
        raise InputError(f"{root} holds no pictures; put {_listing(PICTURES)} files there")
    if metadata.is_file():
        pictures, problems = _from_metadata(metadata, found)
    else:
        pictures, problems = _from_sidecars(found, files)
    if not pictures:
        raise InputError(
            f"{root} holds {len(found)} pictures but no captions; write a {METADATA} or a .txt file beside each picture"
        )
    return CaptionedFolder(root, tuple(pictures), tuple(problems))


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _listing(names: Iterable[str]) -> str:
    *first, last = sorted(names)
    return f"{', '.join(first)} or {last}"


def _from_metadata(metadata: Path, found: Sequence[Path]) -> tuple[list[Picture], list[Problem]]:
    known = set(found)
    pictures: dict[tuple[Path, Box | None], Picture] = {}
    problems: list[Problem] = []
    missing: list[tuple[int, str]] = []
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{metadata} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        picture = _entry(line, metadata.parent, f"{metadata} line {number}")
        if (picture.path, picture.box) in pictures:
            problems.append(Problem(picture.path, f"named again in {METADATA} line {number}; the first entry is used"))
        elif picture.path in known or picture.path.is_file():
            pictures[picture.path, picture.box] = picture
        else:
            missing.append((number, str(picture.path.relative_to(metadata.parent))))
    if missing:
        number, name = missing[0]
        count = f"{len(missing)} of {len(pictures) + len(missing)} entries name missing pictures"
        raise InputError(
            f"{metadata} line {number}: {name} does not exist ({count}); put it there or take the line out"
        )
    named = {path for path, _ in pictures}
    unnamed = [Problem(path, f"no line of {METADATA} names it") for path in found if path not in named]
    return list(pictures.values()), problems + unnamed


def _entry(line: str, root: Path, where: str) -> Picture:
    """One metadata line as a Picture; `where` names file and line for the error."""
    try:
        columns = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); write one JSON object a line") from None
    if not isinstance(columns, dict):
        raise InputError(f'{where} is not a JSON object; write {{"file_name": ..., "text": ...}}')
    name = columns.pop("file_name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f'{where} has no file_name; write "file_name": "images/cat.png"')
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {name} lies outside the folder; give a path relative to {root}")
    text, more, split = columns.pop("text", None), columns.pop("captions", None), columns.pop("split", None)
    box = _box(columns.pop("box", None), f"{where}: box of {name}")
    if not isinstance(text, str | None):
        raise InputError(f'{where}: text of {name} is not a string; write "text": "a cat"')
    if more is not None and not (isinstance(more, list) and all(isinstance(caption, str) for caption in more)):
        raise InputError(f'{where}: captions of {name} is not a list of strings; write "captions": ["a cat", "cat"]')
    if not isinstance(split, str | None):
        raise InputError(f'{where}: split of {name} is not a string; write "split": "train"')
    captions = _captions([text or "", *(more or [])])
    if not captions:
        raise InputError(f'{where}: {name} has no caption; write "text": "what the picture shows"')
    return Picture(path, captions, split or "train", columns, box)


def _box(value: Any, what: str) -> Box | None:
    if value is None:
        return None
    whole = isinstance(value, list) and len(value) == 4 and all(type(side) is int and side >= 0 for side in value)
    if not whole or not (value[0] < value[2] and value[1] < value[3]):
        raise InputError(f"{what} is no part of a picture; write [left, upper, right, lower] in pixels")
    return (value[0], value[1], value[2], value[3])


def _from_sidecars(found: Sequence[Path], files: Sequence[Path]) -> tuple[list[Picture], list[Problem]]:
    available = set(files)
    pictures: list[Picture] = []
    problems: list[Problem] = []
    used: set[Path] = set()
    for path in found:
        sidecars = [path.with_suffix(suffix) for suffix in SIDECARS if path.with_suffix(suffix) in available]
        if not sidecars:
            problems.append(Problem(path, f"no caption file beside it; write {path.with_suffix('.txt').name}"))
            continue
        captions = _captions(line for sidecar in sidecars for line in _lines(sidecar))
        if not captions:
            raise InputError(f"{sidecars[0]} is empty; write what {path.name} shows, one caption a line")
        used.update(sidecars)
        pictures.append(Picture(path, captions))
    stray = [path for path in files if path.suffix in SIDECARS and path not in used]
    return pictures, problems + [Problem(path, "no picture of that name beside it") for path in stray]


def _lines(sidecar: Path) -> list[str]:
    try:
        return sidecar.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{sidecar} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _captions(lines: Iterable[str]) -> tuple[str, ...]:
    """Stripped, without empty ones and repetitions, in order."""
    return tuple(dict.fromkeys(caption for line in lines if (caption := line.strip())))


def load_pixels(pictures: CaptionedFolder | Sequence[Picture], size: int, cache: Path) -> Pixels:
    """Decodes each picture to (size, size, 3) uint8 RGB, once: the array is kept in the folder `cache`.

    A picture is turned upright (EXIF), laid on white if it is transparent, brought to 8-bit RGB, resized with Lanczos
    to cover the square, and centre-cropped. The cache is keyed by the bytes of the files, their order, the transform
    and the size, never by names or dates. A picture that cannot be read costs a line in `problems`, not the run.

    Raises InputError if there is no picture, none can be read, or the cache cannot be written.
    """
    chosen = pictures.pictures if isinstance(pictures, CaptionedFolder) else tuple(pictures)
    if size < 1:
        raise InputError(f"a picture size of {size} is no size; give 1 or more pixels")
    if not chosen:
        raise InputError("there are no pictures to load; give at least one")
    cache = Path(cache)
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        target = cache / f"{_key(chosen, size, pool)}.npy"
        kept = _open(target, len(chosen), size)
        if kept is None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                _decode_all(chosen, size, target, pool)
            except OSError as error:
                raise InputError(
                    f"cannot write the pixel cache {cache}: {error.strerror or error}; free space or name another place"
                ) from error
            kept = _open(target, len(chosen), size)
    if kept is None:
        raise InputError(f"the pixel cache {target} was changed while it was written; run again")
    array, unreadable = kept
    problems = tuple(Problem(chosen[index].path, reason) for index, reason in unreadable.items())
    return Pixels(array, tuple(p for index, p in enumerate(chosen) if index not in unreadable), problems)


def _key(pictures: Sequence[Picture], size: int, pool: Executor) -> str:
    digest = hashlib.sha256(f"{TRANSFORM}; {size}".encode())
    paths = list(dict.fromkeys(picture.path for picture in pictures))
    content = dict(zip(paths, pool.map(_file_digest, paths), strict=True))
    for picture in pictures:
        digest.update(content[picture.path] + (repr(picture.box).encode() if picture.box else b""))
    return digest.hexdigest()[:32]


def _file_digest(path: Path) -> bytes:
    """32 bytes; a file that cannot be read has a digest of its own, so that it is decoded anew once it can."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        return hashlib.sha256(f"unreadable: {error.strerror}".encode()).digest()


def _open(target: Path, count: int, size: int) -> tuple[np.ndarray, dict[int, str]] | None:
    """The cached array (rows, size, size, 3) and the reasons by index of the left-out pictures; None if not there."""
    try:
        unreadable = {int(index): str(reason) for index, reason in json.loads(_reasons(target).read_text()).items()}
        array: np.ndarray = np.load(target, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, AttributeError):
        return None
    whole = array.shape == (count - len(unreadable), size, size, 3) and array.dtype == np.uint8
    return (array, unreadable) if whole else None


def _reasons(target: Path) -> Path:
    return target.with_suffix(".json")


def _decode_all(pictures: Sequence[Picture], size: int, target: Path, pool: Executor) -> None:
    """Writes `target` and, first, the reasons of the pictures left out; each aside and renamed, the array last."""
    unreadable: dict[int, str] = {}
    sheet = lru_cache(SHEETS_HELD)(_sheet)

    def decode(picture: Picture) -> np.ndarray | str:
        return _try_decode(picture, size, sheet)

    def write_rows(file: BinaryIO) -> None:
        _write_header(file, len(pictures), size)
        for start in range(0, len(pictures), ROWS_A_WRITE):
            rows = pictures[start : start + ROWS_A_WRITE]
            for index, decoded in enumerate(pool.map(decode, rows), start=start):
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
        _write_header(file, len(pictures) - len(unreadable), size)
        file.flush()
        os.fsync(file.fileno())
        _write_aside(_reasons(target), lambda reasons: reasons.write(json.dumps(unreadable).encode()))

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


def _write_header(file: BinaryIO, rows: int, size: int) -> None:
    """A NumPy 1.0 header of 128 bytes whatever the count of rows, so that it can be written again at the end."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rows}, {size}, {size}, 3), }}".ljust(117) + "\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1"))


def _try_decode(picture: Picture, size: int, sheet: Callable[[Path], Image.Image]) -> np.ndarray | str:
    """The picture as (size, size, 3) uint8, or the reason why it cannot be read; `sheet` opens a file with many."""
    try:
        if picture.box is not None:
            whole = sheet(picture.path)
            if picture.box[2] > whole.width or picture.box[3] > whole.height:
                return (
                    f"its box {list(picture.box)} reaches beyond the {whole.width} x {whole.height} pixels of the file"
                )
            return np.asarray(_square(whole.crop(picture.box), size))
        with Image.open(picture.path) as image:
            return np.asarray(_square(image, size))
    except Exception as error:  # decoders raise whatever they like on a broken file
        if isinstance(error, Image.UnidentifiedImageError):
            return "is not a picture that can be read"
        return f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _sheet(path: Path) -> Image.Image:
    """A file whole and upright in memory."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        upright.load()
        return upright


def _square(image: Image.Image, size: int) -> Image.Image:
    image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a half, quarter or eighth, never below this
    upright = ImageOps.exif_transpose(image)
    return ImageOps.fit(_rgb(upright), (size, size), Image.Resampling.LANCZOS)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency on white; 16-bit greys scaled to 8, not clipped."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")
