"""Which pictures are kept for testing where nobody has marked them: a part of them, by a hash of their names."""

import hashlib
from dataclasses import replace

from latentgen.data.folder import CaptionedFolder


def hold_out(folder: CaptionedFolder, split: str, part: float) -> CaptionedFolder:
    """The folder with about `part` of its pictures in `split`; as it is if one is in it already, or `part` is 0.

    A picture's place depends on its own name in the folder alone, so adding others moves none. At least one is held
    out, and at least one is not, of a folder of two or more.
    """
    if folder.select(split) or part <= 0 or len(folder.pictures) < 2:
        return folder
    chances = [_chance(f"{p.path.relative_to(folder.root).as_posix()}{p.box or ''}") for p in folder.pictures]
    first, last = min(chances), max(chances)
    pictures = (
        replace(picture, split=split) if chance == first or (chance < part and chance < last) else picture
        for picture, chance in zip(folder.pictures, chances, strict=True)
    )
    return replace(folder, pictures=tuple(pictures))


def _chance(name: str) -> float:
    """In [0, 1), uniform over names."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:6], "big") / 2**48
