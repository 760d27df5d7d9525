"""Which pictures a model has not been trained on: those that the recipe beside its weights holds out.

Weights without a recipe were made elsewhere; of a folder where no picture is marked as held out (nor in a folder that
is named so), a twentieth is then.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentgen.checkpoint import read_json
from latentgen.data import Picture, hold_out, read_folder
from latentgen.data.decode import BACKGROUND
from latentgen.data.picture import Box
from latentgen.errors import InputError


@dataclass(frozen=True)
class Division:
    """How a folder is read and divided, as a recipe's [data] says it.

    split: what is held out; part: of the pictures, where none is in that split; captions: "files" or "names". folders:
    whether folders with the names of splits are splits, as each run took them; held out is what was so for all of them.
    """

    split: str = "test"
    part: float = 0.05
    captions: str = "files"
    background: str = BACKGROUND
    folders: tuple[bool, ...] = (True,)


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
    return [
        Division(
            **{names[key]: value for key, value in run.items() if key in names},
            folders=(bool(run.get("folders")),),  # runs that do not say it took no folder for a split
        )
        for run in told
        if run
    ]


def division_of(weights: Path, asked: Asked) -> tuple[Division, str]:
    """The division to judge by, and a line for people where pictures may be judged that were trained on ("" if not).

    Of weights that were fine-tuned it is what both runs held out. Raises InputError for a part that is none.
    """
    runs = trained_with(weights)
    last = runs[-1] if runs else Division()
    least = min((run.part for run in runs if run.split == last.split), default=last.part)
    given = {key: value for key, value in vars(asked).items() if value is not None}
    folders = tuple(sorted({way for run in runs or [last] for way in run.folders}))
    division = replace(last, **{"part": least, "folders": folders, **given})
    if not 0 <= division.part < 1:
        raise InputError(f"--hold-out is {division.part:g}; it must be 0 or more and below 1, as 0.05")
    for run in runs:
        if division.split != run.split or division.part > run.part:
            told = f"hold_out = {run.part:g}, held_out = {run.split!r}"
            return division, f"pictures may be judged that {weights.name} was trained on: its recipe says {told}"
    return division, ""


def divided(root: Path, division: Division) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """The pictures held out, and all others, which are those a training run takes."""

    def key(picture: Picture) -> tuple[Path, Box | None]:
        return picture.path, picture.box

    read = [read_folder(root, division.captions, folders=way) for way in division.folders]
    ways = [hold_out(folder, division.split, division.part) for folder in read]
    held = set.intersection(*({key(picture) for picture in way.select(division.split)} for way in ways))
    pictures = ways[-1].pictures
    return tuple(p for p in pictures if key(p) in held), tuple(p for p in pictures if key(p) not in held)
