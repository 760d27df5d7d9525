"""Arrays of an evaluation that are made once: renderings and features, each in a file named by its content."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from latentgen.durable import write_file


def kept(place: Path | None, count: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of `count` rows in `place` (.npy); made, and written whole or not at all, where none such is there."""
    if place is not None:
        try:
            found: np.ndarray = np.load(place, allow_pickle=False)
            if len(found) == count:
                return found
        except (OSError, ValueError, EOFError):
            pass  # not there, or torn
    made = make()
    if place is not None:
        file = io.BytesIO()
        np.save(file, made, allow_pickle=False)
        write_file(place, file.getvalue())
    return made
