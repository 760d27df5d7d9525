"""What several verbs are made of."""

import sys
from pathlib import Path

import click

PATH = click.Path(path_type=Path)


def report(line: object) -> None:
    """One line of a run's account, on standard error."""
    print(line, file=sys.stderr, flush=True)


def say(line: object) -> None:
    """One line for the person, on standard error."""
    report(f"latentgen: {line}")
