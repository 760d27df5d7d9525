"""Graphs as ONNX Runtime computes them on this machine, kept in the user's cache.

Making a graph ready (constants folded, float16 widened, convolutions' weights put into the blocks that this CPU's
kernels read) takes most of the time from a shell to a picture, and its result is the same every time. So it is kept,
named by all that it depends on, and the next process maps it into memory. A copy is checked by its hashes whenever it
is opened (CRC-32, which is several times as fast as what weights from elsewhere are compared by), and made anew where
it is torn. Where all copies, and graphs with LoRAs fused, take more than `ROOM`, those used longest ago go.
"""

import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from latentgen.checkpoint import Checkpoint, SingleFile, check_safetensors
from latentgen.checkpoint.keys import prefix
from latentgen.durable import alone, crc32
from latentgen.errors import InputError
from latentgen.models.onnx.places import cache_folder, fused_folders, layout

ROOM = 6 << 30  # bytes that all copies may take, and the graphs with LoRAs fused
FORM = 3  # of what is kept; one more whenever a graph is made ready otherwise
BEGUN = 60.0  # seconds in which whoever makes the folder of a copy has come to hold it, too
SHARE = 0.25  # of the free disk that one may take
PACKED = 1 << 27  # bytes of weights up to which they are kept as linear layers read them, too: half as much again
WIDE = "widened.bin"  # the weights before they are laid out, which go then
GRAPH, WEIGHTS, HASHES = "graph.onnx", "weights.bin", "hashes.json"


@dataclass(frozen=True)
class Ready:
    """The place of one network's copy, whether it is there or not. graph: the file that it is a copy of."""

    folder: Path
    graph: Path

    @classmethod
    def of(cls, checkpoint: Checkpoint, part: str, graph: Path, held: bytes, version: str) -> "Ready | None":
        """The place for a graph of a checkpoint under a version of ONNX Runtime; None where none can be named.

        held: what the graph's file holds.
        """
        try:
            names = [checkpoint.fingerprint, layout(checkpoint, part), version, machine_code(), FORM]
            place = cache_folder(checkpoint).parent / "ready"
        except (OSError, InputError):  # a file that has gone, or no home folder
            return None
        digest = hashlib.sha256(json.dumps(names).encode() + held).hexdigest()
        return cls(place / f"{digest[:32]}-{part}", graph)

    def open(self, load: Callable[[Path], Any]) -> Any:
        """What `load` makes of the copy's graph; None where there is no whole copy (a torn one is removed)."""
        if not (self.folder / HASHES).is_file():
            return None
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(self._is_whole)  # hashed while it is loaded
            try:
                loaded = load(self.folder / GRAPH)
            except Exception:  # ONNX Runtime's own, of a file that is none; the hashes say the same
                loaded = None
            if loaded is not None and whole.result():
                with suppress(OSError):  # a cache that is somebody else's, or cannot be written
                    os.utime(self.folder)
                return loaded
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def make(self, write: Callable[[Path], None], size: int) -> bool:
        """Have `write`, told where, leave the copy; whether it is there. size: about, in bytes."""
        aside = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(4)}.writing")
        with ExitStack() as held:
            try:
                with suppress(InputError):  # where it cannot be held, nobody takes it for one that was left
                    held.enter_context(alone(aside))
                if size > min(ROOM, SHARE * shutil.disk_usage(aside).free):
                    return False
                copy = aside / "copy"
                copy.mkdir()
                write(copy / GRAPH)
                (copy / WIDE).unlink(missing_ok=True)
                files = {path.name: crc32(path) for path in copy.iterdir()}
                (copy / HASHES).write_text(json.dumps(files), encoding="utf-8")
                copy.rename(self.folder)
                self._make_room()
                return True
            except OSError:  # no place to keep it: a picture can be rendered all the same
                return False
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def _is_whole(self) -> bool:
        try:
            files = json.loads((self.folder / HASHES).read_text(encoding="utf-8"))
            return GRAPH in files and all(crc32(self.folder / name) == found for name, found in files.items())
        except (OSError, ValueError, TypeError, AttributeError):
            return False

    def _make_room(self) -> None:
        """Remove what killed processes left, then what was used longest ago until the rest fits into `ROOM`."""
        for folder in self.folder.parent.glob(".*.writing") if sys.platform != "win32" else ():
            with suppress(InputError, OSError):  # somebody writes there, which Windows does not tell; or it has gone
                if time.time() - folder.stat().st_mtime > BEGUN:
                    with alone(folder):
                        shutil.rmtree(folder, ignore_errors=True)
        copies = [folder for folder in self.folder.parent.iterdir() if (folder / HASHES).is_file()]
        left = ROOM
        for folder in sorted([*copies, *fused_folders()], key=lambda folder: folder.stat().st_mtime, reverse=True):
            left -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if left < 0 and folder != self.folder and not self.graph.is_relative_to(folder):
                shutil.rmtree(folder, ignore_errors=True)


def widened_size(checkpoint: Checkpoint, part: str) -> int:
    """How many bytes a network's weights take in float32, however they are stored; of a single file its own alone."""
    start = ""
    if isinstance(checkpoint, SingleFile):
        start = prefix(part, checkpoint.has_second, checkpoint.tower(part))
    headers = [check_safetensors(file) for file in checkpoint.weights[part]]
    own = [entry for header in headers for name, entry in header.items() if name.startswith(start)]
    return sum(4 * prod(entry["shape"]) for entry in own if "shape" in entry)  # "__metadata__" has none


@cache
def machine_code() -> str:
    """What of the CPU decides how weights are laid out: its name and its instructions."""
    told = Path("/proc/cpuinfo")
    if not told.is_file():
        return "\n".join((platform.machine(), platform.processor()))  # which may start a process to be told
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join((platform.machine(), *sorted(found)))
