"""The pictures a fine-tuning run learns from: read, checked, captioned, some of them held out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latentgen.data import Ledger, Picture, hold_out, load_pixels, read_folder
from latentgen.data.folder import PICTURES, CaptionedFolder, is_hidden
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
    return read_folder(root, settings.captions)


def _named(root: Path, settings: Finetune, captions: Sequence[str]) -> CaptionedFolder:
    """Every picture with the same captions; but for DreamBooth and new words, captions that say the word are kept."""
    try:
        folder = read_folder(root, settings.captions)
    except InputError as error:
        if "but no captions" not in str(error):
            raise
        folder = _bare(root)
    word = settings.token or (RARE if settings.method == "dreambooth" else None)
    spoken = None if word is None else re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)

    def said(picture: Picture) -> tuple[str, ...]:
        own = tuple(text for text in picture.captions if spoken is not None and spoken.search(text))
        return own or tuple(captions)

    uncaptioned = [problem.path for problem in folder.problems if problem.kind == "without caption"]
    more = [Picture(path, tuple(captions)) for path in uncaptioned if path.suffix.lower() in PICTURES]
    kept = tuple(problem for problem in folder.problems if problem.kind != "without caption")
    known = {picture.path for picture in folder.pictures}
    pictures = [replace(picture, captions=said(picture)) for picture in folder.pictures]
    pictures += [picture for picture in more if picture.path not in known]
    return replace(folder, pictures=tuple(pictures), problems=kept)


def _bare(root: Path) -> CaptionedFolder:
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    shown = [path for path in found if not is_hidden(path.relative_to(root))]
    return CaptionedFolder(root, tuple(Picture(path, ("",)) for path in shown), (), ())


def _check_different(root: Path, pixels: np.ndarray, report: Report) -> None:
    if len(pixels) == 1:
        report("data: one picture alone: what is learned is that picture; five or more let it tell thing from view")
    elif bool((pixels == pixels[0]).all()):
        raise InputError(f"{root}: its {len(pixels)} pictures are all the same one; give different ones")
