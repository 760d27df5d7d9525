"""A file's picture as people see it: upright, on a background, in 8-bit sRGB; of an animated file the first frame."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps

from latentgen.data.colours import to_srgb
from latentgen.data.picture import Picture
from latentgen.errors import InputError

BACKGROUND = "white"
WHITE_16 = 2**16 - 1
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG
SHORT_TEXT = 1000  # bytes, which hold less than a megabyte even compressed
Seen = TypeVar("Seen")
SHEETS_HELD = 4  # decoded files kept at hand for the pictures that lie in them


class CannotDecode(Exception):
    """Why a picture cannot be read, in words for people."""


@dataclass(frozen=True)
class Opened:
    """A decoded picture. mode: the file's own, as Pillow names it; frames: how many it has, the first is `image`."""

    image: Image.Image  # RGB, upright
    mode: str
    frames: int
    transparent: bool
    size: tuple[int, int]  # of the file or the box, upright; `image` may be smaller where a draft was asked for


def read_colour(name: str) -> tuple[int, int, int]:
    """ "white", "#ff8800" or "rgb(0, 0, 0)" as 8-bit RGB. Raises InputError for what is no colour."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise InputError(f"background is {name!r}; give a colour such as white, black or #ff8800") from None


class Opener:
    """Opens pictures on one background, and keeps the last few files that hold many of them."""

    def __init__(self, background: str = BACKGROUND) -> None:
        self.colour = read_colour(background)
        self._sheet: Callable[[Path], tuple[Image.Image, int]] = lru_cache(SHEETS_HELD)(_sheet)

    def open(self, picture: Picture, draft: int | None = None) -> Opened:
        """The picture, decoded. draft: a large JPEG may come out smaller, but never below this side in pixels.

        Raises CannotDecode.
        """
        try:
            if picture.box is not None:
                return self._part(picture)
            file = picture.path if picture.stored is None else io.BytesIO(picture.read())
            return _look(file, lambda image: self._whole(image, draft))
        except (CannotDecode, InputError):  # the second is of what is not the picture's fault
            raise
        except Exception as error:  # decoders raise whatever they like on a broken file
            if isinstance(error, Image.UnidentifiedImageError):
                raise CannotDecode("is not a picture that can be read") from error
            if isinstance(error, Image.DecompressionBombError):
                most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
                raise CannotDecode(f"has more than {most} megapixels, which are not opened; make it smaller") from error
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CannotDecode(f"cannot be decoded: {words}") from error

    def _whole(self, image: Image.Image, draft: int | None) -> Opened:
        frames, size = getattr(image, "n_frames", 1), image.size
        if draft is not None:
            image.draft(None, (draft, draft))  # decoded at a half, quarter or eighth
        upright = ImageOps.exif_transpose(image)
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return self._opened(upright, image.mode, frames, size[::-1] if turned else size)

    def _part(self, picture: Picture) -> Opened:
        whole, frames = self._sheet(picture.path)
        box = picture.box
        assert box is not None
        if box[2] > whole.width or box[3] > whole.height:
            size = f"{whole.width} x {whole.height}"
            raise CannotDecode(f"its box {list(box)} reaches beyond the {size} pixels of the file")
        part = whole.crop(box)
        return self._opened(part, whole.mode, frames, part.size)

    def _opened(self, image: Image.Image, mode: str, frames: int, size: tuple[int, int]) -> Opened:
        return Opened(to_rgb(to_srgb(image), self.colour), mode, frames, image.has_transparency_data, size)


def to_rgb(image: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """8-bit RGB; transparency on `colour`; 16-bit greys and floats of [0, 1] scaled to 8 bits, not clipped.

    32-bit integers are 16-bit greys in a wider type where the lightest is one. Raises CannotDecode for integers and
    floats of another range, whose white nobody has said.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "I" and not (values.min() >= 0 and (values.max() > 255 or not values.any())):
            raise CannotDecode(f"holds {_range(values)}, not 16-bit greys; save it with 8 or 16 bits")
        if values.max() > WHITE_16:
            raise CannotDecode(f"holds {_range(values)}, above the {WHITE_16} of 16 bits; save it with 8 or 16 bits")
        grey = np.rint(values / 257).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # one grey value that is transparent
            below = np.asarray(colour, np.uint8)
            return Image.fromarray(np.where((values == clear)[..., None], below, grey[..., None]))
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise CannotDecode("holds floating-point values outside 0 to 1; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*colour, 255))
        ground.alpha_composite(image.convert("RGBA"))
        return ground.convert("RGB")
    return image.convert("RGB")


def _range(values: np.ndarray) -> str:
    return f"32-bit integers from {values.min():.0f} to {values.max():.0f}"


def _sheet(path: Path) -> tuple[Image.Image, int]:
    """A file whole and upright in memory, and its count of frames."""

    def whole(image: Image.Image) -> tuple[Image.Image, int]:
        frames = getattr(image, "n_frames", 1)
        upright = ImageOps.exif_transpose(image)
        upright.load()
        return upright, frames

    return _look(path, whole)


def _look(file: Path | io.BytesIO, see: Callable[[Image.Image], Seen]) -> Seen:
    """What `see` sees in an opened file; in a PNG whose texts are longer than Pillow reads, without those."""
    try:
        with Image.open(file) as image:
            return see(image)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    with Image.open(io.BytesIO(_without_texts(data))) as image:
        return see(image)


def _without_texts(png: bytes) -> bytes:
    """A PNG without its longer texts; anything else as it is."""
    kept, at = [png[: len(PNG)]], len(PNG)
    while png.startswith(PNG) and at + 12 <= len(png):  # of a chunk: 4 bytes of length, 4 of kind, content, 4 of sum
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in TEXTS or length <= SHORT_TEXT:
            kept.append(png[at : at + 12 + length])
        at += 12 + length
    return b"".join([*kept, png[at:]])
