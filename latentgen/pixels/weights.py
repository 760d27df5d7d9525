"""A pixel model's weights folder: written whole, read back, rendered from; and its sheet."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen.checkpoint import STEMS, read_json
from latentgen.checkpoint.tensors import save_tensors
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.durable import MANIFEST, sha256, torn, write_folder
from latentgen.errors import InputError
from latentgen.models.finite import check_finite
from latentgen.models.pixel import load_pixel_unet
from latentgen.pixels import FORM, is_pixel_folder
from latentgen.pixels.model import Family, PixelModel, sampler_of
from latentgen.request import Request, Terms, read_request

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
        model.unet.save_config(folder / "unet")
        save_tensors(_dense(model.unet), folder / f"unet/{STEMS['unet']}.safetensors", {"format": "pt"})
        if model.learned is not None:
            save_tensors(_dense(model.learned), folder / SCHEDULE)
        for name, content in ((FORM, form), ("recipe.json", recipe), ("metrics.json", figures)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(recipe, figures, licences), encoding="utf-8")
        (folder / "sheet.png").write_bytes(drawn.getvalue())

    return write_folder(out, write)


def _dense(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in module.state_dict().items()}


def load_pixels(folder: Path) -> tuple[PixelModel, tuple[str, ...], Mapping[str, Any]]:
    """The model, its classes, and how it is rendered unless told otherwise.

    Raises InputError for another folder, and where a file is not the one that the manifest names.
    """
    form = _form(folder)
    try:
        family, classes, shape = Family.of(form["family"]), tuple(form["classes"]), tuple(form["shape"])
        model = PixelModel(load_pixel_unet(folder / "unet"), family, len(classes), shape, form["patch"])
        if model.learned is not None:
            model.learned.load_state_dict(load_file(folder / SCHEDULE))
        told = {key: form["sample"][key] for key in ("steps", "guidance", "sampler")}
        return model.requires_grad_(False).eval(), classes, told
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is not whole: {' '.join(str(error).split())}; train it again") from error


def _form(folder: Path) -> dict[str, Any]:
    """What the folder says of its model. Raises InputError for another folder, and for a torn one."""
    if not is_pixel_folder(folder):
        raise InputError(f"{folder} holds no pixel model (no {FORM}); give one that a pixel recipe trained")
    if (folder / MANIFEST).is_file() and (flaw := torn(folder)) is not None:
        raise InputError(f"{folder} is not whole: {flaw}; fetch or train it again")
    return read_json(folder / FORM)


def fingerprint(folder: Path) -> str:
    """SHA-256 over all that decides a picture but how it is rendered unless told: networks, family, classes."""
    form = _form(folder)
    told = json.dumps({key: value for key, value in form.items() if key != "sample"}, sort_keys=True)
    files = (folder / name for name in ("unet/config.json", f"unet/{STEMS['unet']}.safetensors", SCHEDULE))
    hashes = [sha256(path) for path in files if path.is_file()]
    return hashlib.sha256("\n".join((told, *hashes)).encode()).hexdigest()


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

    Arguments as `read_order`'s.
    """
    return read_order(folder, names, steps=steps, guidance=guidance, sampler=sampler, seed=seed, n=n).pictures()


class Order(NamedTuple):
    """What a pixel model was asked for, checked. classes: all that it knows; numbers: of each picture's."""

    model: PixelModel
    classes: tuple[str, ...]
    numbers: tuple[int, ...]
    request: Request

    def pictures(self, rows: Sequence[int] | None = None) -> list[tuple[str, int, Image.Image]]:
        """(class, seed, picture) of each, or of some, computed together: sums' last bits can depend on what is beside.

        Raises InputError where one is no finite numbers.
        """
        asked, chosen = self.request, range(len(self.numbers)) if rows is None else rows
        numbers, seeds = [self.numbers[row] for row in chosen], [asked.seeds[row] for row in chosen]
        options: dict[str, Any] = {"steps": asked.steps, "sampler": asked.sampler, "guidance": asked.guidance}
        pixels = self.model.render(numbers, seeds, **options)
        check_finite(pixels, "pixels")
        named = zip(numbers, seeds, pixels, strict=True)
        return [(self.classes[number], seed, to_image(x)) for number, seed, x in named]


def read_order(
    folder: Path,
    names: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    n: int = 1,
) -> Order:
    """Read a model from its folder, and check what it is asked for as every request is.

    A class may be named without its article and in either case, where that is one class alone. What is not told is as
    the recipe had it; without a seed a fresh first one is drawn. Raises InputError for what cannot be, and for a class
    that the model does not know.
    """
    model, classes, told = load_pixels(folder)
    own = sampler_of(model.family.objective, told["sampler"])
    terms = Terms(1, model.shape[0], model.shape[1], own, steps=told["steps"], guidance=told["guidance"])
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed, "n": n}
    request = read_request(terms, SAMPLERS, list(names), **given)
    return Order(model, classes, tuple(_number(name, classes) for name in request.prompts), request)


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
