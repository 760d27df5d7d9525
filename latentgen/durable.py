"""Files and folders that are written whole or not at all: aside, synced to the disk, then renamed into place."""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from latentgen.errors import InputError
from latentgen.stopping import half_done

MANIFEST = "manifest.json"
_LEFT = re.compile(r"\..+\.(npy|keys|json)\.\d+|\..+\.writing")  # files that are renamed when they are whole
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock says of a file that somebody else holds


def user_cache() -> Path:
    """Where what can be made or fetched again is kept: $XDG_CACHE_HOME/latentgen, or ~/.cache/latentgen.

    Raises InputError where neither can be named.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentgen"
    except RuntimeError as error:
        raise InputError("there is no home folder to keep caches in; set XDG_CACHE_HOME") from error


def write_file(target: Path, data: bytes) -> None:
    """Put `data` at `target`: the file that was there before stays until the new one is whole and on the disk.

    Parent folders are made. Raises InputError when the place cannot be written or the disk is full.
    """
    with saying_what_failed(target):
        check_plain(target)
        with _whole(target.parent, data) as aside:
            aside.replace(target)


def check_plain(target: Path) -> None:
    """Refuse a place of something that is no file to replace: a folder; /dev/null, which a rename would replace."""
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {target}: it is no plain file; name another place")


def write_free(folder: Path, names: Iterable[str], data: bytes) -> Path:
    """Put `data` into `folder` under the first of `names` that is not there; its path.

    Nothing is replaced, however many processes write there at once. The file is whole from the first; on a file system
    without hard links an empty one holds its name just before. Raises InputError as `write_file`, and where no
    name is free.
    """
    with saying_what_failed(folder), _whole(folder, data) as aside:
        for name in names:
            if _place(aside, folder / name):
                return folder / name
    raise InputError(f"no name is free in {folder}; name another place")


@contextmanager
def _whole(folder: Path, data: bytes) -> Iterator[Path]:
    """A file in `folder`, which is made, that holds `data` and is on the disk; the folder is synced afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{secrets.token_hex(8)}.writing"  # known before it is there
    with half_done():
        try:
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside
        finally:
            aside.unlink(missing_ok=True)
    sync_folder(folder)


def _place(aside: Path, target: Path) -> bool:
    """Give a whole file another name, if that is free; it may keep the old one too."""
    try:
        os.link(aside, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the name is taken by an empty file first
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        try:
            aside.replace(target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return True


def check_writable(folder: Path) -> None:
    """Say now, rather than after long work, that nothing can be written there."""
    existing = folder.absolute()
    with saying_what_failed(folder):  # as below a folder that may not be searched
        while not existing.exists():
            if existing == existing.parent:
                raise InputError(f"cannot write into {folder}: there is no {existing}; name another place")
            existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write into {folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {folder}: {existing} may not be written; name another place")


def write_folder(target: Path, write: Callable[[Path], None], *, prove: bool = False) -> Path:
    """Call `write(aside)` on an empty folder beside `target`, add the manifest, sync, and swap it into place at once.

    The manifest (`manifest.json`) holds the SHA-256 and the size of every file that `write` made. Whatever stood in
    the old folder and is not in the old manifest (a training run's state, somebody's notes) is carried over, so only
    what we wrote is ever replaced. The old folder is removed only after the new one stands in its place; killed at any
    moment, one of the two is there, whole. prove: the new one is read back before it takes the old one's place.

    Returns `target`. Raises InputError when the disk is full, the place cannot be written, what was written does not
    read back, or a file that is not ours stands where one of ours would go; the old folder is then as it was.
    """
    target = Path(target).resolve()  # through a link: what it points to is replaced, not the link
    aside = target.with_name(f".{target.name}.writing")
    with half_done(), saying_what_failed(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        if target.exists() and not target.is_dir():
            raise InputError(f"{target} is a file where a folder should go; name another place")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            write(aside)
            _write_manifest(aside)
            _carry_over(target, aside)
            for folder, _, names in os.walk(aside):
                for name in names:
                    _sync(Path(folder, name))
                sync_folder(Path(folder))
            if prove and (flaw := torn(aside)) is not None:
                raise InputError(f"{target} does not read back as it was written ({flaw}); look at the disk")
            _swap(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def torn(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` wrote; None where every file is what its manifest says."""
    try:
        hashes = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        hashes = {}
    if not hashes:
        return f"its {MANIFEST} is missing or torn"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} was altered or torn"
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written below a folder that this process holds (`alone`)."""
    for path in folder.rglob(".*"):
        if path.is_dir() and path.suffix == ".writing":
            shutil.rmtree(path, ignore_errors=True)
        elif _LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be) for this process; the system lets go of it however the process ends.

    Raises InputError when another process holds it, or may, as the file system has no locks. Where the system itself
    has none (Windows) nothing is held.
    """
    refusal = f"another run trains in {folder}; wait for it, or give another --out"
    with _held(folder, folder / ".lock", refusal, surely=True):
        yield


@contextmanager
def new_place(target: Path) -> Iterator[None]:
    """Hold a place where nothing is yet, for this process to write; a lock lies beside it as long.

    A file "model.safetensors" and a folder "model" are one place, as the tokenizers of the one go into the other.
    Folders above it are made, and stay if something is written. Raises InputError where something is there, and when
    another process holds it. Where there are no locks (Windows, some network drives) nothing is held.
    """
    _check_new(target)
    stem = target.with_suffix("") if target.suffix == ".safetensors" else target
    lock = stem.with_name(f".{stem.name}.lock")
    above = [folder for folder in lock.parents if not folder.exists()]
    refusal = f"another latentgen writes {target} now; wait for it, or name a new place"
    with half_done():
        try:
            with _held(target, lock, refusal, surely=False):
                try:
                    _check_new(target)
                    yield
                finally:
                    with suppress(OSError):
                        lock.unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # one with something in it stays
                for folder in above:
                    folder.rmdir()


def _check_new(target: Path) -> None:
    with saying_what_failed(target):
        if target.exists():
            raise InputError(f"{target} is already there; name a new place")


@contextmanager
def _held(place: Path, lock: Path, refusal: str, *, surely: bool) -> Iterator[None]:
    """Hold a place by a lock's file, which is made. Raises an InputError of this line when another process holds it.

    surely: also where the file system has no locks; else nothing is held there.
    """
    with saying_what_failed(place):
        lock.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # it has no flock, and removes no file that is open
        yield
        return
    import fcntl

    with saying_what_failed(place):
        file = lock.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if surely or error.errno in _TAKEN:
                raise InputError(refusal) from None
        if not _is_at(lock, file):  # who held it has removed it, and perhaps somebody else made it anew
            raise InputError(refusal)
        yield


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def recover(target: Path) -> None:
    """Put the old folder back where a swap was cut between its two renames (only where no atomic exchange exists)."""
    target = target.absolute()
    old = target.parent / f".{target.name}.old"
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32(path: Path) -> str:
    """The CRC-32 of a file, in hexadecimal: for what this machine made itself, where damage is all there is to find."""
    found, block = 0, memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            found = zlib.crc32(block[:count], found)
    return f"{found:08x}"


@contextmanager
def saying_what_failed(target: Path) -> Iterator[None]:
    """Turn the system's refusals (a full disk, a read-only place) into the one line a person can act on."""
    try:
        yield
    except (OSError, _safetensor_error()) as error:
        number = error.errno if isinstance(error, OSError) else _number_of(error)
        if number is None and not isinstance(error, OSError):
            raise  # not the system's
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left on the disk while writing {target}: nothing was changed there; free some and run again"
            ) from error
        why = os.strerror(number) if number else error
        raise InputError(f"cannot write {target}: {why}; name a place that can be written") from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable; systems that cannot open a folder (Windows) do without."""
    if sys.platform != "win32":
        _sync(folder)


def _safetensor_error() -> type[Exception]:
    """What safetensors raises; OSError where it was not imported, which a start is the shorter for."""
    module = sys.modules.get("safetensors")
    return OSError if module is None else module.SafetensorError


def _number_of(error: Exception) -> int | None:
    """The system's number of an error that safetensors met; None where it is one of its own."""
    found = re.search(r"(?:os error|code:) (\d+)", str(error))
    return int(found[1]) if found else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    manifest = {
        "files": {name: sha256(path) for name, path in zip(names, files, strict=True)},
        "sizes": {name: path.stat().st_size for name, path in zip(names, files, strict=True)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _carry_over(old: Path, new: Path) -> None:
    """Link (or copy) into `new` every file of `old` that its manifest does not list, and every empty folder."""
    if not old.is_dir():
        return
    shutil.copymode(old, new)
    try:
        ours = set(json.loads((old / MANIFEST).read_text(encoding="utf-8"))["files"]) | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        place = new / name
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                place.mkdir(parents=True, exist_ok=True)
            continue
        if name in ours:
            continue
        if place.exists():
            raise InputError(
                f"{path} was not written by latentgen and would be replaced; move it or name another folder"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, place, follow_symlinks=False)


def _swap(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
    elif not _exchange(aside, target):
        old = target.with_name(f".{target.name}.old")
        target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)  # after an exchange the old folder stands at `aside`, and the caller removes it


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (renameat2(2), Linux); False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
