"""Which pictures a model has not been trained on: those that the recipe beside its weights holds out.

Weights without a recipe were made elsewhere; of a folder where no picture is marked, a twentieth is then held out.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentgen.checkpoint import read_json
from latentgen.data import Picture, hold_out, read_folder
from latentgen.data.decode import BACKGROUND
from latentgen.errors import InputError


@dataclass(frozen=True)
class Division:
    """How a folder is read and divided, as a recipe's [data] says it.

    split: what is held out; part: of the pictures, where none is in that split; captions: "files" or "names".
    """

    split: str = "test"
    part: float = 0.05
    captions: str = "files"
    background: str = BACKGROUND


@dataclass(frozen=True)
class Asked:
    """What shall be otherwise than the recipe says; None leaves it."""

    split: str | None = None
    part: float | None = None
    captions: str | None = None
    background: str | None = None


def trained_with(weights: Path) -> list[Division]:
    """The divisions that a weights folder was trained with, a fine-tuning run's last; [] where it does not say."""
    files = ((weights / "recipe.json", "data"), (weights / "finetune.json", "settings"))
    told: list[dict[str, Any] | None] = [read_json(file).get(section) for file, section in files if file.is_file()]
    names = {"held_out": "split", "hold_out": "part", "captions": "captions", "background": "background"}
    return [Division(**{names[key]: value for key, value in run.items() if key in names}) for run in told if run]


def division_of(weights: Path, asked: Asked) -> tuple[Division, str]:
    """The division to judge by, and a line for people where pictures may be judged that were trained on ("" if not).

    Of weights that were fine-tuned it is what both runs held out. Raises InputError for a part that is none.
    """
    runs = trained_with(weights)
    last = runs[-1] if runs else Division()
    least = min((run.part for run in runs if run.split == last.split), default=last.part)
    given = {key: value for key, value in vars(asked).items() if value is not None}
    division = replace(last, **{"part": least, **given})
    if not 0 <= division.part < 1:
        raise InputError(f"--hold-out is {division.part:g}; it must be 0 or more and below 1, as 0.05")
    for run in runs:
        if division.split != run.split or division.part > run.part:
            told = f"hold_out = {run.part:g}, held_out = {run.split!r}"
            return division, f"pictures may be judged that {weights.name} was trained on: its recipe says {told}"
    return division, ""


def divided(root: Path, division: Division) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """The pictures held out, and all others, which are those a training run takes."""
    folder = hold_out(read_folder(root, division.captions), division.split, division.part)
    return folder.select(division.split), tuple(each for each in folder.pictures if each.split != division.split)
