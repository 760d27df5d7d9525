"""Where pictures go: the file that was asked for, which is replaced, or a free name in a folder."""

import re
from collections.abc import Iterator, Sequence
from itertools import count, dropwhile
from pathlib import Path

from latentgen.durable import check_plain, check_writable, write_file, write_free
from latentgen.errors import InputError


def places_of(out: Path | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes, of a prompt and a seed. Raises InputError where nothing can be written there.

    A .png file is what it is called, numbered where there are several; else in a folder each has a free name.
    """
    if out is not None and out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise InputError(f"{out} is no PNG; pictures are written as .png, which holds how they were made")
        check_writable(out.parent)
        digits = len(str(len(seeds)))
        numbered_ones = [out.with_name(f"{out.stem}-{k + 1:0{digits}}{out.suffix}") for k in range(len(seeds))]
        places = [out] if len(seeds) == 1 else numbered_ones
        for place in places:
            check_plain(place)
        return places
    folder = out or Path()
    check_writable(folder)
    chosen: dict[Path, None] = {}
    for prompt, seed in zip(prompts, seeds, strict=True):
        names = map(folder.joinpath, names_of(prompt, seed))
        chosen[next(path for path in names if path not in chosen and not path.exists())] = None
    return list(chosen)


def write_picture(place: Path, out: Path | None, prompt: str, seed: int, data: bytes) -> Path:
    """Write a picture's file at its place of `places_of`, and return where it is.

    A file that was asked for is replaced. In a folder nothing is: where somebody else took the name meanwhile, it gets
    the next that is free.
    """
    if place.parent != (out or Path()):
        write_file(place, data)
        return place
    return write_free(place.parent, dropwhile(lambda name: name != place.name, names_of(prompt, seed)), data)


def replay_place(picture: Path, out: Path | None) -> Path:
    """Where a replayed picture goes: `out` itself where that is a file, else what its name is without a number."""
    target = beside = picture.with_name(f"{picture.stem}-replay.png")
    if out is not None:
        folder = out.is_dir() or not out.suffix
        target = out / f"{picture.stem}.png" if folder else out
        if folder and target.resolve() == picture.resolve():
            target = beside
    if target.suffix.lower() != ".png":
        raise InputError(f"{target} is no PNG; pictures are written as .png, which holds how they were made")
    check_writable(target.parent)
    if target == out:  # which alone is replaced
        check_plain(target)
    return target


def write_replay(place: Path, out: Path | None, data: bytes) -> Path:
    """Write a replayed picture at its place of `replay_place`, as `write_picture` does."""
    if place == out:
        write_file(place, data)
        return place
    return write_free(place.parent, numbered(place.stem), data)


def names_of(prompt: str, seed: int) -> Iterator[str]:
    """What a picture may be called in a folder: STEM.png, and where that is there STEM-2.png, STEM-3.png …"""
    return numbered(f"{slug(prompt)}-{seed}")


def numbered(stem: str) -> Iterator[str]:
    """STEM.png, STEM-2.png, STEM-3.png …"""
    return (f"{stem}{f'-{number}' if number > 1 else ''}.png" for number in count(1))


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:40].rstrip("-_") or "picture"
