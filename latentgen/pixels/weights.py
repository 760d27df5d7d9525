"""A pixel model's weights folder: written whole, read back, rendered from; and its sheet."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentgen.durable import MANIFEST, torn, write_folder
from latentgen.errors import InputError
from latentgen.models.finite import check_finite
from latentgen.models.pixel import load_pixel_unet
from latentgen.pixels import FORM, is_pixel_folder
from latentgen.pixels.model import Family, PixelModel

SCHEDULE = "schedule.safetensors"
SCALE, GAP = 2, 4  # of a sheet


def save_pixels(
    out: Path,
    model: PixelModel,
    classes: Sequence[str],
    recipe: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, float]],
    *,
    sheet: Image.Image,
    licences: str = "",
) -> Path:
    """Write the folder, whole or not at all: unet/ as diffusers has it, a learned schedule, the form, the figures."""
    drawn = io.BytesIO()
    sheet.save(drawn, "PNG", optimize=True)
    form = {
        "classes": list(classes),
        "shape": list(model.shape),
        "patch": model.patch,
        "family": vars(model.family),
        "sample": recipe["sample"],
    }

    def write(folder: Path) -> None:
        model.unet.save_pretrained(folder / "unet", safe_serialization=True)
        if model.learned is not None:
            save_file({k: v.contiguous() for k, v in model.learned.state_dict().items()}, folder / SCHEDULE)
        for name, content in ((FORM, form), ("recipe.json", recipe), ("metrics.json", figures)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(recipe, figures, licences), encoding="utf-8")
        (folder / "sheet.png").write_bytes(drawn.getvalue())

    return write_folder(out, write)


def load_pixels(folder: Path) -> tuple[PixelModel, tuple[str, ...], Mapping[str, Any]]:
    """The model, its classes, and how it is rendered unless told otherwise.

    Raises InputError for another folder, and where a file is not the one that the manifest names.
    """
    if not is_pixel_folder(folder):
        raise InputError(f"{folder} holds no pixel model (no {FORM}); give one that a pixel recipe trained")
    if (folder / MANIFEST).is_file() and (flaw := torn(folder)) is not None:
        raise InputError(f"{folder} is not whole: {flaw}; fetch or train it again")
    try:
        form = json.loads((folder / FORM).read_text(encoding="utf-8"))
        family, classes, shape = Family.of(form["family"]), tuple(form["classes"]), tuple(form["shape"])
        model = PixelModel(load_pixel_unet(folder / "unet"), family, len(classes), shape, form["patch"])
        if model.learned is not None:
            model.learned.load_state_dict(load_file(folder / SCHEDULE))
        return model.requires_grad_(False).eval(), classes, form["sample"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is not whole: {' '.join(str(error).split())}; train it again") from error


def render_classes(
    folder: Path,
    names: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    n: int = 1,
) -> list[tuple[str, int, Image.Image]]:
    """n pictures of each class, from the weights of a folder: (class, seed, picture), picture k having seed + k.

    A class may be named without its article and in either case, where that is one class alone. What is not told is as
    the recipe had it. Raises InputError for a class that the model does not know.
    """
    model, classes, told = load_pixels(folder)
    labels = [_number(name, classes) for name in names for _ in range(n)]
    seeds = [seed + place for place in range(len(labels))]
    pictures = model.render(
        labels,
        seeds,
        steps=told["steps"] if steps is None else steps,
        guidance=told["guidance"] if guidance is None else guidance,
        sampler=told["sampler"] if sampler is None else sampler,
    )
    check_finite(pictures, "pixels")
    return [(classes[label], own, to_image(x)) for label, own, x in zip(labels, seeds, pictures, strict=True)]


def _number(name: str, classes: Sequence[str]) -> int:
    if name in classes:
        return classes.index(name)
    alike = [number for number, each in enumerate(classes) if _bare(each) == _bare(name)]
    if not alike:
        raise InputError(f"this model does not know {name!r}; it can be one of: {', '.join(classes)}")
    if len(alike) > 1:
        raise InputError(f"{name!r} may be {' or '.join(repr(classes[number]) for number in alike)}; write which")
    return alike[0]


def _bare(name: str) -> str:
    words = name.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an") else words)


def to_image(x: Tensor) -> Image.Image:
    """(C, H, W) in [−1, 1] -> a picture, grey where C is 1."""
    values = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))


def class_sheet(pictures: Tensor, classes: Sequence[str]) -> Image.Image:
    """Pictures (rows · classes, C, H, W), a column for each class under its name, enlarged."""
    side, font = pictures.shape[-1] * SCALE, ImageFont.load_default(size=10)
    rows, line = len(pictures) // len(classes), 14
    sheet = Image.new("RGB", (len(classes) * (side + GAP) + GAP, rows * (side + GAP) + GAP + line), "#d0d0d0")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(classes):
        pen.text((GAP + column * (side + GAP), 1), _bare(name)[: side // 5], fill="black", font=font)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, len(classes))
        large = to_image(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(large, (GAP + column * (side + GAP), line + GAP + row * (side + GAP)))
    return sheet


def _card(recipe: Mapping[str, Any], figures: Mapping[str, Mapping[str, float]], licences: str) -> str:
    rows = "\n".join(
        f"| {stage} | {figure.replace('_', ' ')} | {value:.5g} |"
        for stage, values in figures.items()
        for figure, value in values.items()
    )
    source = f"\n## What it was trained on\n\n{licences.strip()}\n" if licences else ""
    return (
        f"# {recipe['name']}\n\n"
        f"A labelled diffusion model in pixels, {recipe['objective']}, {recipe['network']['blocks']} blocks; the "
        "recipe as it was resolved is `recipe.json`. Likelihoods are bits a dimension of held-out pictures given their "
        "class; `error` is one standard error over the pictures.\n\n"
        "![A column for each class, fixed seeds](sheet.png)\n\n"
        f"| stage | figure | value |\n|---|---|---|\n{rows}\n{source}"
    )
