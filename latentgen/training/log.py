"""The log of a stage: a line of JSON for every step and every validation, with all figures.

A line that a kill cut short, or that stands twice because a run went on from an earlier step, is for `entries` to sort
out. A figure that is not finite is null; a step that was skipped says so.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from latentgen.durable import saying_what_failed
from latentgen.errors import InputError
from latentgen.training.loop import Progress

Entry = dict[str, float | bool | None]


class Log:
    """Lines that are gathered, and appended to a file together; by the main process alone."""

    def __init__(self, path: Path, main: bool) -> None:
        self._path, self._main = path, main
        self._lines: list[str] = []
        self._begun = False

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.write()
        except InputError:
            if error is None:  # else that one says what is wrong
                raise

    def step(self, progress: Progress) -> None:
        """The figures of one step."""
        told = _told(progress.step, figures_of(progress))
        self._add({**told, "skipped": True} if progress.skipped else told)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Those of a validation."""
        self._add(_told(step, figures))

    def write(self) -> None:
        """Append what was gathered. Raises InputError where it cannot be written."""
        if not self._lines:
            return
        data = "".join(line + "\n" for line in self._lines).encode()
        with saying_what_failed(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                if not self._begun and file.tell():
                    file.seek(-1, 2)
                    data = data if file.read(1) == b"\n" else b"\n" + data  # after a line that was cut short
                file.write(data)
        self._begun = True
        self._lines.clear()

    def _add(self, entry: Entry) -> None:
        if self._main:
            self._lines.append(json.dumps(entry, allow_nan=False))


def figures_of(progress: Progress) -> Mapping[str, float]:
    """What a step is worth a line for, beside its number."""
    return {**progress.losses, "rate": progress.rate, "norm": progress.norm}


def entries(path: Path) -> list[dict[str, float]]:
    """What a log says, in the order of steps; of two lines of a kind for one step the later counts.

    Left out are lines that are not whole, and figures that were not finite.
    """
    merged: dict[tuple[float, bool], dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            key = (float(entry["step"]), "norm" in entry)
        except (ValueError, KeyError, TypeError):
            continue
        merged[key] = {name: float(value) for name, value in entry.items() if _is_figure(value)}
    return [merged[key] for key in sorted(merged)]


def _told(step: int, figures: Mapping[str, float]) -> Entry:
    rounded = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in figures.items()}
    return {"step": step, **rounded}


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
