"""What several verbs are made of."""

import math
import sys
from pathlib import Path

import click

from latentgen.errors import InputError

PATH = click.Path(path_type=Path)


def report(line: object) -> None:
    """One line of a run's account, on standard error."""
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
