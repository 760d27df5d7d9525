"""What options of several verbs are made of."""

from pathlib import Path

import click

PATH = click.Path(path_type=Path)
