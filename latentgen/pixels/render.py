"""Classes rendered into PNG files from a pixel model's weights: `latentgen render --weights FOLDER CLASS`."""

import io
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from latentgen.durable import write_file
from latentgen.errors import InputError
from latentgen.image import PARAMETERS, SETTINGS
from latentgen.pixels.weights import render_classes
from latentgen.render import places_of


def render_files(
    folder: Path, names: Sequence[str], out: Path | None, *, n: int = 1, seed: int | None = None, **told: Any
) -> Iterator[Path]:
    """n pictures of each class as PNG files that say how they were made; yields each path once it is written.

    out: a .png file or a folder. told: steps, guidance, sampler; None is as the recipe had it. Raises InputError.
    """
    if n < 1:
        raise InputError(f"--n is {n}; it must be 1 or more")
    first = secrets.randbits(32) if seed is None else seed
    targets = places_of(out, [name for name in names for _ in range(n)], range(first, first + n * len(names)))
    made = render_classes(folder, names, seed=first, n=n, **told)
    for target, (name, own, picture) in zip(targets, made, strict=True):
        settings = {"kind": "pixels", "prompt": name, "seed": own, "folder": str(folder), **told}
        write_file(target, _png(picture, {key: value for key, value in settings.items() if value is not None}))
        yield target


def _png(picture: Image.Image, settings: dict[str, Any]) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(SETTINGS, json.dumps(settings, sort_keys=True))
    info.add_text(PARAMETERS, ", ".join(f"{key}: {value}" for key, value in settings.items()))
    drawn = io.BytesIO()
    picture.save(drawn, "PNG", pnginfo=info)
    return drawn.getvalue()
