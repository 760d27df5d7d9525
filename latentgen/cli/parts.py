"""What several verbs are made of."""

import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentgen.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

HEAD = 1 << 16  # bytes of a report by which it is known


class Place(click.Path):
    """A path, or what may be one (a hub id, FILE:WEIGHT). `~` is the home folder, where no shell has seen to it.

    `~name` is what is here of that name, else that user's home folder (on Windows the former alone).
    """

    def __init__(self, path_type: type[Path] | None = None, *, weights: bool = False) -> None:
        """weights: it is for what opens paths in UTF-8 alone, and takes each `~` for the home folder."""
        super().__init__(path_type=path_type)
        self.weights = weights

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What was typed; `--out=~/a` is one word to a shell, which leaves it as it is. Raises InputError."""
        if isinstance(value, str) and value.startswith("~"):
            value = from_home(value)
        if self.weights and str(Path(value)).startswith("~"):
            value = str(Path(value).absolute())
        if self.weights and any("\udc80" <= letter <= "\udcff" for letter in str(value)):
            raise InputError(f"{value}: weights cannot be opened by a name that is not UTF-8; rename it")
        return super().convert(value, param, ctx)


def from_home(typed: str) -> str:
    """A path that begins with `~`, with the home folder it means, if any. Raises InputError where that is nowhere."""
    ours = typed[1:2] in ("", os.sep, os.altsep)
    if not ours and (sys.platform == "win32" or os.path.lexists(typed)):
        return typed
    path = os.path.expanduser(typed)  # noqa: PTH111 (a Path would not keep FILE:WEIGHT)
    if path == typed:
        raise InputError(f"{typed}: there is no home folder of that name; write ./{typed} for what is here")
    return path


PATH, PLACE = Place(Path), Place(weights=True)  # PLACE: text, as it may be no path
FOLDER = Place(Path, weights=True)  # or file, of weights


def check_report(path: Path, begins: str) -> None:
    """Say before any work that a report cannot be written at `path`, or would replace what is none.

    begins: a pattern of how an earlier report begins, which alone is replaced.
    """
    from latentgen.durable import check_writable

    check_writable(path.parent)
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path} is no file; name another place for the report")
    with path.open("rb") as file:
        head = file.read(HEAD).decode(errors="replace")
    if head and not re.match(begins, head):
        raise InputError(f"{path} is there and is no such report, which alone would be replaced; name another place")


def console() -> "Console":
    """Rich's console on standard output; where nobody reads it any longer that is an error, as for `print`."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Piped()


def report(line: object) -> None:
    """One line of a run's account, on standard error."""
    if sys.stderr is not None:  # and not on standard output, where `print` would go
        print(line, file=sys.stderr, flush=True)


def say(line: object) -> None:
    """One line for the person, on standard error."""
    report(f"latentgen: {line}")


def read_values(text: str, option: str, least: float, whole: bool = False) -> tuple[float, ...]:
    """ "1,2,4.5" as numbers of `least` or more. Raises InputError."""
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(v) and v >= least and (not whole or v.is_integer()) for v in values):
        kind = "whole numbers" if whole else "numbers"
        raise InputError(
            f"{option} is {text!r}; it must be {kind} of {least:g} or more with commas between, as 5,10,25"
        )
    return tuple(int(v) for v in values) if whole else values
