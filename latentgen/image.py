"""Pictures that say how they were made: settings in the PNG's own text chunks, and the same bytes every time."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from latentgen.errors import InputError

SETTINGS, PARAMETERS = "latentgen", "parameters"  # the second is the line people's picture viewers know


class Picture(Image.Image):
    """A rendered picture. `settings` is all it takes to make it again; saved as PNG, it carries them."""

    settings: Mapping[str, Any]

    @classmethod
    def of(cls, pixels: np.ndarray, settings: Mapping[str, Any]) -> "Picture":
        """From uint8 pixels (H, W, 3)."""
        picture = cls()
        height, width, _ = pixels.shape
        picture.__setstate__([{}, "RGB", (width, height), None, np.ascontiguousarray(pixels).tobytes(), settings])
        return picture

    def __getstate__(self) -> list[Any]:
        """PIL's, and the settings: they travel with a pickle and a deep copy."""
        return [*super().__getstate__(), self.settings]

    def __setstate__(self, state: list[Any]) -> None:
        super().__setstate__(state)
        self.settings = state[-1]

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As PIL's, with the settings added to a PNG that is not given a `pnginfo` of its own."""
        name = fp if isinstance(fp, str | Path) else getattr(fp, "name", "")
        if (format or Path(str(name)).suffix.lstrip(".")).lower() == "png":
            params.setdefault("pnginfo", chunks(self.settings))
        super().save(fp, format, **params)

    def png(self) -> bytes:
        """The PNG file: the same bytes for the same pixels and settings."""
        buffer = io.BytesIO()
        self.save(buffer, "png")
        return buffer.getvalue()


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] as uint8, rounded to the nearest."""
    return (pixels * 255).round().astype(np.uint8)


def chunks(settings: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """Two text chunks: "latentgen", the settings as JSON, and "parameters", the same for people to read."""
    info = PngImagePlugin.PngInfo()
    info.add_text(SETTINGS, json.dumps(settings, sort_keys=True))
    info.add_text(PARAMETERS, describe(settings))
    return info


def describe(settings: Mapping[str, Any]) -> str:
    """The settings in the form that picture viewers of the field show."""
    weights = settings.get("weights") or {}
    drawn = not {"generator", "latents"} & {*(settings.get("brought") or ())}  # else another's noise, of no seed
    facts = {
        "Steps": settings["num_inference_steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"] if drawn else None,
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": weights.get("name"),
        "Model hash": (weights.get("sha256") or "")[:10] or None,
        "Version": f"latentgen {settings['latentgen']}",
    }
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)])


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a PNG carries. Raises InputError for a file that is no picture, or one that was not made here."""
    try:
        with Image.open(path) as picture:
            picture.load()  # text may stand after the pixels, and a torn file shows here
            text = picture.info.get(SETTINGS)
    except FileNotFoundError as error:
        raise InputError(f"no picture at {path}") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise InputError(f"{path} says nothing of how it was made; only a PNG that latentgen rendered can be replayed")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its settings are torn: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: its settings are no JSON object")
    return settings
