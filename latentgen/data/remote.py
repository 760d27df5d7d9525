"""Tar shards at an address (https://, s3://, whatever fsspec opens), for what outgrows a disk.

A shard is fetched whole when one of its members is read, while the one after it is fetched ahead, and stays below
$XDG_CACHE_HOME until room is needed: those used longest ago go first. What is in it (its members' places and hashes,
its captions) is written down when it first arrives, so that a shard is not fetched again to list it or to see whether
it has changed; a shard that has changed at its address has another size or tag, and is another one.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from latentgen.durable import saying_what_failed, user_cache, write_file
from latentgen.errors import InputError

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.IGNORECASE)  # as a Path has it, one slash is left of two
TAGS = ("etag", "content-md5", "digest", "last-modified", "lastmodified", "updated", "md5hash", "mtime")
LIMIT = "LATENTGEN_SHARDS_GIB"  # how much of them is kept, where half of the free disk is not right
TRIES, PAUSE = 5, 1.0  # of fetching one; seconds before the second try, twice as long before each further one
ASKED_AT_ONCE = 8
Say = Callable[[str], object]


def address_of(name: str) -> str | None:
    """The address that a source's name is, both slashes in place; None where it is a path."""
    found = ADDRESS.fullmatch(name)
    if not found:
        return None
    root = "/" if found[1].lower() == "file" else ""
    return f"{found[1].lower()}://{root}{found[2]}"


def as_told(path: Path) -> str:
    """A source's path for people: an address with both of its slashes."""
    return address_of(str(path)) or str(path)


class Store:
    """The shards of one source, in their order, as far as they lie here."""

    def __init__(self, addresses: Sequence[str], say: Say) -> None:
        self.say, self._one_at_a_time, self._coming = say, threading.Lock(), set[int]()
        self._lost: dict[int, InputError] = {}  # said again at once: many threads may be waiting for one shard
        self.folder = user_cache() / "shards"
        with saying_what_failed(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        _clear(self.folder)
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            asked = list(pool.map(_ask, addresses))
        numbered = enumerate(zip(addresses, asked, strict=True))
        self.shards = [RemoteTar(url, number, *told, self) for number, (url, told) in numbered]

    def open(self, shard: "RemoteTar") -> BinaryIO:
        """The shard's file, fetched where it does not lie here; the one after it is fetched meanwhile.

        Raises InputError where it cannot be fetched.
        """
        while True:
            self._fetch(shard)
            with contextlib.suppress(FileNotFoundError):  # it may have made room for another since
                file = shard.path.open("rb")
                break
        with contextlib.suppress(FileNotFoundError):
            os.utime(shard.path)
        for after in self.shards[shard.number + 1 : shard.number + 2]:
            if after.number not in self._coming and not after.path.exists():
                self._coming.add(after.number)
                threading.Thread(target=self._fetch_ahead, args=(after,), daemon=True).start()
        return file

    def _fetch_ahead(self, shard: "RemoteTar") -> None:
        with contextlib.suppress(InputError):  # said when it is asked for
            self._fetch(shard, beside=self.shards[shard.number - 1])
        self._coming.discard(shard.number)

    def _fetch(self, shard: "RemoteTar", beside: "RemoteTar | None" = None) -> None:
        """beside: the shard that is being read meanwhile, which makes no room."""
        with self._one_at_a_time:
            if shard.path.exists():
                return
            if shard.number in self._lost:
                raise InputError(str(self._lost[shard.number]))
            self._make_room(shard, beside)
            self.say(f"data: fetching {shard.url} ({shard.size / 2**20:.1f} MiB)")
            try:
                _download(shard)
            except InputError as error:
                self._lost[shard.number] = error
                raise

    def _make_room(self, shard: "RemoteTar", beside: "RemoteTar | None") -> None:
        """Remove those used longest ago until this one has its place. Raises InputError where it has none."""
        lying = sorted((status.st_mtime_ns, status.st_size, path) for path, status in _statuses(self.folder))
        taken = sum(size for _, size, _ in lying)
        told = os.environ.get(LIMIT)
        limit = _gib(told) if told else (shutil.disk_usage(self.folder).free + taken) / 2
        for _, size, path in lying:
            if taken + shard.size > limit and (beside is None or path != beside.path):
                path.unlink(missing_ok=True)
                taken -= size
        if taken + shard.size > limit:
            what = f"{LIMIT} is {told}" if told else f"half of what is free at {self.folder} is {limit / 2**30:.2g} GiB"
            need = f"too little for a shard of {shard.size / 2**30:.2g} GiB"
            raise InputError(f"{what}, {need}; free space, or set {LIMIT}")


@dataclass(frozen=True)
class RemoteTar:
    """One shard at its address, and where it lies while it is needed. number: among the store's."""

    url: str
    number: int
    size: int
    tag: str
    store: Store = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its file's name."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def place(self) -> Path:
        """The path that names it; nothing need lie there."""
        return Path(self.url)

    @property
    def path(self) -> Path:
        """Where it lies, if it does."""
        return self.store.folder / f"{self._digest}.tar"

    @property
    def listing(self) -> Path:
        """Where it is written down what is in it."""
        return self.store.folder / f"{self._digest}.json"

    @property
    def stamp(self) -> list[int]:
        """What changes when it does."""
        return [int(self._digest[:12], 16), self.size]

    @property
    def _digest(self) -> str:
        return hashlib.sha256(f"{self.url}\n{self.size}\n{self.tag}".encode()).hexdigest()[:32]

    def listed(self, make: Callable[[Path], Any]) -> Any:
        """What `make` writes down of it, JSON; made once."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.listing.read_text(encoding="utf-8"))
        self.store.open(self).close()
        found = make(self.path)
        write_file(self.listing, json.dumps(found).encode())
        return found


def _statuses(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob("*.tar"):
        with contextlib.suppress(OSError):  # another process made room
            found.append((path, path.stat()))
    return found


def _clear(folder: Path) -> None:
    """Remove what killed processes left half fetched."""
    for part in folder.glob("*.part"):
        try:
            os.kill(int(part.name.split(".")[1]), 0)
        except (ProcessLookupError, ValueError):
            part.unlink(missing_ok=True)
        except PermissionError:
            pass  # it runs, for somebody else


def _gib(told: str) -> float:
    try:
        found = float(told) * 2**30
    except ValueError:
        found = -1.0
    if not found >= 0:
        raise InputError(f"{LIMIT} is {told!r}; give a number of GiB")
    return found


def _ask(url: str) -> tuple[int, str]:
    """A shard's size, and a tag that changes with it. Raises InputError where it is not there or tells no size."""
    system, path = _system(url)
    try:
        told = system.info(path)
    except Exception as error:  # whatever the protocol raises
        why = error.__cause__ if isinstance(error, FileNotFoundError) else error  # over HTTP for all that goes wrong
        if why is None or getattr(why, "status", 0) in (404, 410):
            raise InputError(f"{url} does not exist; give tars that are there") from None
        raise InputError(f"{url} cannot be reached ({_words(why)}); run again where it can be") from None
    if not isinstance(told.get("size"), int):
        raise InputError(f"{url} does not say how long it is; serve it with its length, or copy it to a disk")
    tags = sorted((key.lower(), str(value)) for key, value in told.items() if key.lower() in TAGS)
    return told["size"], repr(tags)


def _download(shard: RemoteTar) -> None:
    """Fetch a shard aside and rename it; a broken connection is tried again."""
    system, path = _system(shard.url)
    aside = shard.path.with_suffix(f".{os.getpid()}.part")
    try:
        for number in range(TRIES):
            try:
                system.get_file(path, str(aside))
                found = aside.stat().st_size
                if found != shard.size:
                    raise OSError(f"{found} bytes arrived of {shard.size}")
                aside.replace(shard.path)
                return
            except Exception as error:  # whatever the protocol raises
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise InputError(f"the disk of {shard.store.folder} is full; free space, or set {LIMIT}") from None
                if number == TRIES - 1:
                    raise InputError(
                        f"{shard.url} cannot be fetched ({_words(error)}); the same command goes on once it can be"
                    ) from None
                time.sleep(PAUSE * 2**number)
    finally:
        aside.unlink(missing_ok=True)


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. Raises InputError where it is not installed."""
    import fsspec

    scheme = url.split(":", 1)[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        need = 'pip install "latentgen[shards]"' if scheme in ("http", "https") else _words(error)
        raise InputError(f"{url} cannot be opened yet: {need}") from None
    except ValueError:
        raise InputError(f"{url} starts with {scheme}://, which nothing here opens; give https:// or a path") from None
    return system, path


def _words(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
