"""Colours of pictures with a colour profile, as sRGB. What has none is sRGB already, and costs nothing here."""

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

WORKED_IN = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "PA": "RGB", "CMYK": "CMYK", "L": "L", "LA": "L"}  # by mode
SAME = 2  # of 255: a profile that changes no colour by more is sRGB, written by another hand


def to_srgb(image: Image.Image) -> Image.Image:
    """The picture with its profile's colours in sRGB: RGB, or RGBA where it has transparency, which stays.

    As it is where it has no profile, one that is sRGB, one that does not go with its mode or cannot be used, and where
    it has more than 8 bits.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in WORKED_IN:
        return image
    mode = WORKED_IN[image.mode]
    conversion = _conversion(profile, mode)
    if conversion is None:
        return image
    if not image.has_transparency_data:
        return conversion.apply(image.convert(mode))
    clear = image.convert("RGBA")
    seen = conversion.apply(clear.convert(mode))
    seen.putalpha(clear.getchannel("A"))
    return seen


@lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> "ImageCmsTransform | None":
    """From the profile to sRGB, its black to black (as most programs show it); None where nothing is to be done."""
    from PIL import ImageCms

    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        how, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        conversion = ImageCms.buildTransform(source, srgb, mode, "RGB", how, flags)
    except (ImportError, OSError, ImageCms.PyCMSError):  # the first where Pillow is built without
        return None
    if mode == "CMYK":
        return conversion
    probe = _probe(mode)
    before, after = (np.asarray(one.convert("RGB")).astype(int) for one in (probe, conversion.apply(probe)))
    return conversion if np.abs(after - before).max() > SAME else None


def _probe(mode: str) -> Image.Image:
    """All greys, or 17 steps of each colour."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(17, -1, 3))
