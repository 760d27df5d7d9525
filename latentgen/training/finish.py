"""What stands beside the networks in a finished weights folder: recipe, figures, defaults, licences, a sheet."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours -> diffusers' names
BETAS: Mapping[str, Mapping[str, Any]] = {  # ours -> diffusers' names
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
}


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
) -> dict[str, bytes | str]:
    """Relative path -> content. The data's NOTICE, where it has one, is kept word for word where it is UTF-8."""
    licences = notice_of(data)
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
    notice = data / "NOTICE"
    try:
        return notice.read_bytes().decode("utf-8-sig", errors="replace") if notice.is_file() else ""
    except OSError:
        return ""


def _card(name: str, size: int, figures: Mapping[str, Any], licences: str) -> str:
    rows = "\n".join(
        f"| {stage} | {figure.replace('_', ' ')} | {_told(value)} |"
        for stage, values in figures.items()
        for figure, value in values.items()
    )
    source = f"\n## What it was trained on\n\n{licences.strip()}\n" if licences else ""
    return (
        f"# {name}\n\n"
        f"A text-to-image model for {size} x {size} pictures, trained by `latentgen train pipelines/{name}.toml`; the "
        "recipe as it was resolved is `recipe.json`.\n\n"
        "![Prompts of the recipe, fixed seeds](sheet.png)\n\n"
        f"| stage | figure | value |\n|---|---|---|\n{rows}\n{source}"
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
