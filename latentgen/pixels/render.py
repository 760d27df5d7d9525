"""Classes rendered into PNG files from a pixel model's weights, and made again: `latentgen render --weights FOLDER
CLASS`, `latentgen replay PNG`."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image, PngImagePlugin

from latentgen import __version__
from latentgen.errors import InputError
from latentgen.image import PARAMETERS, SETTINGS
from latentgen.models.loading import machine, use_threads
from latentgen.pixels.weights import fingerprint, read_order
from latentgen.placing import places_of, write_picture
from latentgen.render import not_of, replayed


def render_files(
    folder: Path, names: Sequence[str], out: Path | None, *, n: int = 1, seed: int | None = None, **told: Any
) -> Iterator[Path]:
    """n pictures of each class as PNG files that say how to make them again; yields each path once it is written.

    out: a .png file or a folder. told: steps, guidance, sampler; None is as the recipe had it. Raises InputError.
    """
    order = read_order(folder, names, seed=seed, n=n, **told)
    request = order.request
    targets = places_of(out, request.prompts, request.seeds)
    settings = {"kind": "pixels", "folder": str(folder), "sha256": fingerprint(folder), **_here()}
    settings |= {"steps": request.steps, "guidance": request.guidance, "sampler": request.sampler}
    for row, (target, asked) in enumerate(zip(targets, request.prompts, strict=True)):
        [(name, own, picture)] = order.pictures([row])  # alone, as a replay does
        data = _png(picture, {"prompt": name, "seed": own, **settings})
        yield write_picture(target, out, asked, own, data)


def replay(
    picture: Path,
    out: Path | None = None,
    weights: str | None = None,
    loras: Sequence[str] = (),
    words: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Make a picture again, as `latentgen.render.replay` does; a pixel model's has neither LoRAs nor words."""
    if loras or words:
        raise not_of(picture, f"--lora {loras[0]}" if loras else f"--word {words[0]}", [])
    return replayed(picture, out, partial(_again, picture, weights))


def _again(picture: Path, weights: str | None, settings: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a picture made again from its settings, and the new ones."""
    if "sha256" not in settings:
        raise InputError(f"{picture} is of a version that did not say which weights made it; render its like anew")
    folder = Path(weights or settings["folder"])
    made_with = f"{picture} was made with weights {settings['sha256'][:12]}"
    if not folder.exists():
        raise InputError(f"{made_with}, not found at {folder}; name their folder with --weights")
    told = {key: settings[key] for key in ("steps", "guidance", "sampler", "seed")}
    if (here := fingerprint(folder)) != settings["sha256"]:
        raise InputError(f"{made_with}, and {folder} ({here[:12]}) are others; name the right folder with --weights")
    use_threads(settings["threads"])
    [(_, _, made)] = read_order(folder, [settings["prompt"]], **told).pictures()
    now = {**settings, **_here()}
    return _png(made, now), now


def _here() -> dict[str, Any]:
    """What of this machine the last bits can depend on."""
    return {"latentgen": __version__, "pillow": PIL.__version__, **machine(torch.device("cpu"), torch.float32)}


def _png(picture: Image.Image, settings: dict[str, Any]) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(SETTINGS, json.dumps(settings, sort_keys=True))
    shown = ("prompt", "seed", "steps", "guidance", "sampler", "folder")
    info.add_text(PARAMETERS, ", ".join(f"{key}: {settings[key]}" for key in shown))
    drawn = io.BytesIO()
    picture.save(drawn, "PNG", pnginfo=info)
    return drawn.getvalue()
