"""Values that people give: whole numbers, numbers within bounds, yes or no, arrays of numbers, paths.

Each comes back as Python's own kind, which a picture's settings can hold, and what is none is an InputError, one line.
"""

import errno
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.errors import InputError

LONGEST = 80  # letters of a value in an error


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`, of any kind that is one."""
    limits = f"{least} or more" if most is None else f"from {least} to {most}"
    try:
        number = int(value.__index__())
    except (AttributeError, TypeError):  # of arrays it is there, and raises
        number = None
    if number is None or isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}; it must be a whole number, {limits}")
    if number < least or (most is not None and number > most):
        raise InputError(f"{name} is {shown(number)}; it must be {limits}")
    return number


def finite(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`, which may be infinite; the number itself may not."""
    limits = f"a number of {low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
    try:
        number = float(value)
    except OverflowError as error:
        raise InputError(f"{name} is {shown(value)}, too large to compute with; it must be {limits}") from error
    except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's, of tensors of several numbers
        raise InputError(f"{name} is {shown(value)}; it must be {limits}") from error
    if not math.isfinite(number) or not low <= number <= high:
        raise InputError(f"{name} is {number:g}; it must be {limits}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, of Python's kind or NumPy's, or as 1 or 0; words are not taken for it."""
    if not isinstance(value, bool | np.bool_) and not (isinstance(value, int) and value in (0, 1)):
        raise InputError(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


def check_array(name: str, value: Any) -> None:
    """Raises InputError for what is no array or tensor of real numbers."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"{name}: {kind(value)}; it must be an array or a tensor")
    numpy = isinstance(value.dtype, np.dtype)
    if getattr(value.dtype, "is_complex", numpy and not np.can_cast(value.dtype, np.float64, "same_kind")):
        raise InputError(f"{name} has numbers of type {value.dtype}; they must be real ones, as float32")


def as_path(name: str, value: object) -> Path:
    """A path that somebody gave, whether something is there or not. Raises InputError for what is none."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise InputError(f"{name} is {shown(value)}; it must be a path, as a string or a Path")
    place = Path(value)
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, not ours to look into, with a zero byte
        if getattr(error, "errno", None) == errno.EINVAL:  # Windows' of an address, which `data.remote` reads
            return place
        said = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name} is {shown(str(value))}, which cannot be used as a path: {said}") from error
    return place


def listed(parts: Any) -> list[Any]:
    """The values of a setting that has several; one value alone as a list of itself, which is then too short."""
    return list(parts) if isinstance(parts, Iterable) else [parts]


def kind(value: Any) -> str:
    """How an error names what was given."""
    return "missing" if value is None else f"{shown(value)} ({type(value).__name__})"


def shown(value: Any) -> str:
    """A value in one line that is not too long."""
    try:
        line = " ".join(repr(value).split())
    except ValueError:  # Python's, of a number of more digits than it prints
        line = f"a {type(value).__name__}"
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
