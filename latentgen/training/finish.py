"""What stands beside the networks in a finished weights folder: recipe, figures, defaults, licences, a sheet."""

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from latentgen.checkpoint import read_json
from latentgen.durable import MANIFEST
from latentgen.errors import InputError

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours -> diffusers' names
BETAS: Mapping[str, Mapping[str, Any]] = {  # ours -> diffusers' names
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
}

KEPT = ("clip", "layout", "vae", "decoder")  # stages whose figures hold on where a U-Net is trained on
WRITTEN = ("README.md", "recipe.json", "metrics.json", "sheet.png", "model_index.json", "unet/config.json")
CREDITS = "## What it was trained on"
FIRST_CREDITS = "## What the starting weights were trained on"


def scheduler_config(schedule: str, prediction: str) -> Mapping[str, Any]:
    """What diffusers' scheduler_config.json says of a diffusion, in our names for its schedule and prediction."""
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        **BETAS[schedule],
        "prediction_type": PREDICTIONS[prediction],
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "timestep_spacing": "trailing",
        "final_sigmas_type": "zero",
        "thresholding": False,
    }


def extra_files(
    *,
    name: str,
    recipe: Mapping[str, Any],
    figures: Mapping[str, Any],
    defaults: Mapping[str, Any],
    size: int,
    data: Path,
    sheet: Image.Image,
    credits_before: str = "",
) -> dict[str, bytes | str]:
    """Relative path -> content. The data's NOTICE, where it has one, is kept word for word where it is UTF-8.

    credits_before: whose pictures the weights that training went on from had learned from, which stands before it.
    """
    notice = notice_of(data).strip()
    licences = "\n\n".join(part for part in (credits_before, "" if notice in credits_before else notice) if part)
    drawn = io.BytesIO()
    sheet.save(drawn, "PNG", optimize=True)
    return {
        "recipe.json": json.dumps(recipe, indent=2, ensure_ascii=False) + "\n",
        "metrics.json": json.dumps(figures, indent=2) + "\n",
        "latentgen.json": json.dumps({"defaults": dict(defaults), "sample_size": size}, indent=2) + "\n",
        "README.md": _card(name, size, figures, licences),
        "sheet.png": drawn.getvalue(),
    }


def notice_of(data: Path) -> str:
    """The NOTICE of a data folder; "" where there is none. What in it is not UTF-8 does not end a run."""
    return _text(data / "NOTICE")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def credited(heading: str, text: str) -> str:
    """A section of a card; "" where there is nothing to say."""
    return f"\n{heading}\n\n{text.strip()}\n" if text.strip() else ""


def state_of(out: Path) -> Path:
    """Where the run of a result keeps its own things: beside it, in OUT.training."""
    place = out if out.name not in ("", "..") else out.resolve()
    return place.with_name(f"{place.name}.training")


def check_places(out: Path, pictures: Path, captions: str) -> None:
    """Raises InputError where a training's result could not be written in the end, or be read as pictures then."""
    check_place(out)
    if captions == "names":
        check_outside(out, pictures)


def check_outside(out: Path, pictures: Path) -> None:
    """Raises InputError where a result would lie among the pictures, whose sheets the next run would read as some."""
    if out.resolve().is_relative_to(pictures.resolve()):
        raise InputError(f"{out} lies among the pictures of {pictures}; name a place outside")


def check_place(out: Path, mark: str = MANIFEST, written: Iterable[str] = WRITTEN) -> None:
    """Raises InputError where a run could not write its result in the end, as something of others stands there.

    Others' is a file, and a folder without the file `mark` that holds what would be `written` (patterns).
    """
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{out} is where this runs, or above it, and would be replaced; name a folder of its own")
    if out.is_dir():
        free = (out / mark).is_file() or not any(any(out.glob(pattern)) for pattern in written)
    else:
        free = not out.exists()
    if not free:
        raise InputError(f"{out} exists and is no result of this command; name another place with --out")


def parts_before(figures: Mapping[str, Any], trained: Mapping[str, Any]) -> list[dict[str, float]]:
    """What a U-Net was trained in so far, the first part first: steps, batch and rate of each.

    figures: its metrics; trained: its recipe's [unet.train]. Where the metrics are of before parts were listed, their
    sum of steps is one part, of which nothing else is known.
    """
    listed: list[dict[str, float]] = list(figures.get("parts_before") or [])
    if not listed and figures.get("steps_before"):
        listed = [{"steps": figures["steps_before"]}]
    last = {"steps": figures.get("steps", 0.0), **{key: trained[key] for key in ("batch", "rate") if key in trained}}
    return [*listed, last] if last["steps"] else listed


@dataclass(frozen=True)
class Before:
    """What a weights folder tells of its training: figures by stage, its recipe as resolved, whose pictures it saw."""

    figures: Mapping[str, Any]
    recipe: Mapping[str, Any]
    credits: str

    @classmethod
    def of(cls, folder: Path) -> Self:
        """What is not told there is empty. Raises InputError for JSON that is none."""
        paths = (folder / "metrics.json", folder / "recipe.json")
        figures, recipe = (read_json(path) if path.is_file() else {} for path in paths)
        headings = rf"^(?:{CREDITS}|{FIRST_CREDITS})$"
        _, *told = re.split(headings, _text(folder / "README.md"), flags=re.MULTILINE)
        return cls(figures, recipe, "\n\n".join(part.strip() for part in told))

    @property
    def has_layout(self) -> bool:
        """Whether the text encoder has learned the layout."""
        return "layout" in self.figures or self.recipe.get("layout") is not None

    @property
    def kept(self) -> dict[str, Any]:
        """The figures of the stages that are not done again."""
        return {name: self.figures[name] for name in KEPT if name in self.figures}

    def history(self, *more: dict[str, float]) -> dict[str, Any]:
        """The parts that the U-Net was trained in so far, and those after them: figures of one that is trained on."""
        trained = (self.recipe.get("unet") or {}).get("train") or {}
        parts = [*parts_before(self.figures.get("unet", {}), trained), *more]
        return {"steps_before": sum(part["steps"] for part in parts), "parts_before": parts}

    def then(self, part: dict[str, float]) -> dict[str, Any]:
        """The figures of weights whose U-Net was trained on for a part that no recipe tells of."""
        unet = {name: value for name, value in self.figures.get("unet", {}).items() if name != "steps"}
        return {**self.kept, "unet": {**unet, **self.history(part)}}


def _card(name: str, size: int, figures: Mapping[str, Any], licences: str) -> str:
    rows = "\n".join(
        f"| {stage} | {figure.replace('_', ' ')} | {_told(value)} |"
        for stage, values in figures.items()
        for figure, value in values.items()
    )
    return (
        f"# {name}\n\n"
        f"A text-to-image model for {size} x {size} pictures, trained by `latentgen train pipelines/{name}.toml`; the "
        "recipe as it was resolved is `recipe.json`.\n\n"
        "![Prompts of the recipe, fixed seeds](sheet.png)\n\n"
        f"| stage | figure | value |\n|---|---|---|\n{rows}\n{credited(CREDITS, licences)}"
    )


def _told(value: Any) -> str:
    """A figure; or parts of a training: "6,300 steps of batch 64 at rate 0.001, 1,950 steps of …"."""
    if isinstance(value, list):
        return ", ".join(_part(part) for part in value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _part(part: Mapping[str, float]) -> str:
    batch = f" of batch {part['batch']:,.0f}" if "batch" in part else ""
    rate = f" at rate {part['rate']:g}" if "rate" in part else ""
    return f"{part['steps']:,.0f} steps{batch}{rate}"
