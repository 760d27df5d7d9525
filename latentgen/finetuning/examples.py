"""The pictures a fine-tuning run learns from: read, checked, captioned, some of them held out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latentgen.data import Ledger, Picture, hold_out, load_pixels, read_folder
from latentgen.data.folder import PICTURES, CaptionedFolder, in_splits, is_hidden, walk
from latentgen.data.metadata import NAMES, read_metadata
from latentgen.data.picture import Problem
from latentgen.errors import InputError
from latentgen.finetuning.settings import Finetune
from latentgen.training.captions import CaptionTable
from latentgen.training.intake import look_over
from latentgen.training.stage import Report

RARE = "zwx"  # a word that means nothing to anybody's tokenizer


@dataclass(frozen=True)
class Examples:
    """Pixels (N, size, size, 3) uint8 and their captions; those held out; the ledger of every file."""

    pixels: np.ndarray
    pictures: tuple[Picture, ...]
    held_pixels: np.ndarray
    held: tuple[Picture, ...]
    ledger: Ledger

    @property
    def captions(self) -> CaptionTable:
        """Every caption to train on."""
        return CaptionTable(self.pictures)


def subject(settings: Finetune) -> str:
    """What DreamBooth calls its subject: "a zwx cat"."""
    return f"a {settings.token or RARE} {settings.class_word}"


def count_pictures(root: Path, settings: Finetune) -> tuple[CaptionedFolder, int, int]:
    """The folder as it reads, how many pictures it has to train on, and how many that are marked as held out.

    Raises InputError, one line.
    """
    folder = _captioned(root, settings)
    marked = len(folder.select(settings.held_out))
    if folder.pictures and marked == len(folder.pictures):
        raise InputError(f"{root}: all pictures are held out ({settings.held_out!r}); leave some to train on")
    return folder, len(folder.pictures) - marked, marked


def read_examples(folder: CaptionedFolder, settings: Finetune, cache: Path, report: Report) -> Examples:
    """Decode the pictures; every file is accounted for in the ledger. Raises InputError, one line.

    settings: with nothing left open.
    """
    assert settings.size is not None and settings.hold_out is not None
    split = hold_out(folder, settings.held_out, settings.hold_out) if settings.hold_out else folder
    pixels = load_pixels(split, settings.size, cache, settings.background)
    for problem in (*split.problems, *pixels.problems):
        report(f"data: left out {problem.path}: {problem.reason}")
    if split.remark:
        report(split.remark)
    held = np.array([picture.split == settings.held_out for picture in pixels.pictures])
    if held.all():
        raise InputError(f"{folder.root}: all pictures that can be read are held out; leave some to train on")
    taught = tuple(picture for picture, out in zip(pixels.pictures, held, strict=True) if not out)
    tested = tuple(picture for picture, out in zip(pixels.pictures, held, strict=True) if out)
    array = np.ascontiguousarray(pixels.array[~held])
    _check_different(folder.root, array, report)
    ledger = look_over(split, settings.size, settings.background, cache)
    return Examples(array, taught, pixels.array[held], tested, ledger)


def _captioned(root: Path, settings: Finetune) -> CaptionedFolder:
    """The folder with the captions that the method trains on."""
    if settings.method == "textual-inversion":
        return _named(root, settings, [f"a picture of {settings.token}", f"{settings.token}", f"a {settings.token}"])
    if settings.method == "dreambooth":
        return _named(root, settings, [subject(settings)])
    if settings.caption is not None:
        return _named(root, settings, [settings.caption])
    return read_folder(root, settings.captions, folders=settings.folders)


def _named(root: Path, settings: Finetune, captions: Sequence[str]) -> CaptionedFolder:
    """Every picture with the same captions; but for DreamBooth and new words, captions that say the word are kept."""
    try:
        folder = read_folder(root, settings.captions, folders=settings.folders)
    except InputError as error:
        if "but no captions" not in str(error):
            raise
        folder = in_splits(_bare(root, settings.captions), settings.folders)
    word = settings.token or (RARE if settings.method == "dreambooth" else None)
    spoken = None if word is None else re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)

    def said(picture: Picture) -> tuple[str, ...]:
        own = tuple(text for text in picture.captions if spoken is not None and spoken.search(text))
        return own or tuple(captions)

    pictures = {(each.path, each.box): replace(each, captions=said(each)) for each in folder.pictures}
    kept: list[Problem] = []
    for each in folder.problems:
        if each.kind == "without caption" and (each.stored is not None or each.path.is_file()):
            own = Picture(each.path, tuple(captions), each.split, box=each.box, stored=each.stored)
            pictures.setdefault((each.path, each.box), own)
        else:
            kept.append(each)
    return replace(folder, pictures=tuple(pictures.values()), problems=tuple(kept))


def _bare(root: Path, captions: str) -> CaptionedFolder:
    """A folder of which no picture has a caption, each listed with what else a table says of it."""
    there, beyond = walk(root)
    files = [path for path in there if not is_hidden(path.relative_to(root))]
    found = [path for path in files if path.suffix.lower() in PICTURES]
    tables = [path for path in files if path.name in NAMES and captions == "files"]
    problems = [problem for table in tables for problem in read_metadata(table, found)[1]]
    described = {problem.path for problem in problems}
    problems += [
        Problem(path, "nothing describes it", "without caption", split="") for path in found if path not in described
    ]
    problems += [problem for problem in beyond if not is_hidden(problem.path.relative_to(root))]
    return CaptionedFolder(root, (), tuple(problems), tuple(tables))


def _check_different(root: Path, pixels: np.ndarray, report: Report) -> None:
    if len(pixels) == 1:
        report("data: one picture alone: what is learned is that picture; five or more let it tell thing from view")
    elif bool((pixels == pixels[0]).all()):
        raise InputError(f"{root}: its {len(pixels)} pictures are all the same one; give different ones")
