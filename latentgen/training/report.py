"""A run as one HTML page that needs nothing beside it: figures, curves of every stage, sheets, the recipe."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentgen.page import HEIGHT, WIDTH, curve_plot, document, number, table
from latentgen.training.log import entries

__all__ = ["HEIGHT", "WIDTH", "curve_plot", "smoothed", "write_page"]

SHEETS = 6  # shown for each stage: the first, the last, and some between


def write_page(name: str, state: Path, figures: Mapping[str, Mapping[str, float]], recipe: Mapping[str, Any]) -> str:
    """The page of a run, from its logs and sheets. state: the run's own folder; figures: by stage; recipe: resolved."""
    stages = [(stage, place) for stage, told in figures.items() if (place := _place(state, stage, told)) is not None]
    body = [f"<h1>{html.escape(name)}: how it was trained</h1>", _table(figures)]
    for stage, place in stages:
        body.append(f"<h2>{html.escape(stage)}</h2>")
        body.append(f'<div class="plots">{"".join(_plots(entries(place / "log.jsonl")))}</div>')
        body.append(f'<div class="plots">{"".join(_sheets(place / "sheets"))}</div>')
    body.append(f"<h2>recipe</h2><pre>{html.escape(json.dumps(recipe, indent=2, ensure_ascii=False))}</pre>")
    return document(f"{name}: how it was trained", body)


def smoothed(points: Sequence[tuple[float, float | None]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours: a noisy curve that can be read. None is left out."""
    known = [(x, y) for x, y in points if y is not None]
    size = max(1, math.ceil(len(known) / most))
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _place(state: Path, stage: str, figures: Mapping[str, float]) -> Path | None:
    """The folder of a stage: the one that ended in these figures, or else the one worked in last."""
    logs = [path.parent for path in state.glob(f"{stage}-*/log.jsonl")]
    ended = {place: place / "done.json" for place in logs if (place / "done.json").is_file()}
    told = {place: json.loads(done.read_text(encoding="utf-8"))["figures"].items() for place, done in ended.items()}
    fitting = [place for place in told if told[place] <= figures.items()]
    return max(fitting or logs, key=lambda place: (place / "log.jsonl").stat().st_mtime, default=None)


def _plots(told: Sequence[Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(key for entry in told for key in entry if key != "step"))
    curves = {name: [(entry["step"], entry[name]) for entry in told if name in entry] for name in names}
    losses = {name: smoothed(curves[name]) for name in ("loss",) if name in curves}
    losses |= {"validation loss": curves["validation_loss"]} if "validation_loss" in curves else {}
    rest = [name for name in names if name not in ("loss", "validation_loss", "rate", "norm")]
    plots = [curve_plot(losses, "loss")]
    plots += [
        curve_plot({name: smoothed(curves[name])}, name.replace("_", " ")) for name in rest if len(curves[name]) > 1
    ]
    plots += [curve_plot({"norm": smoothed(curves.get("norm", []))}, "gradient norm", log=True)]
    return [*plots, curve_plot({"rate": smoothed(curves.get("rate", []))}, "learning rate")]


def _sheets(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.png"))
    chosen = sorted({round(turn * (len(found) - 1) / (SHEETS - 1)) for turn in range(SHEETS)}) if found else []
    return [
        f'<figure><img src="data:image/png;base64,{base64.b64encode(found[k].read_bytes()).decode()}" alt="">'
        f"<figcaption>{html.escape(found[k].stem)}</figcaption></figure>"
        for k in chosen
    ]


def _table(figures: Mapping[str, Mapping[str, float]]) -> str:
    rows = (
        f"<tr><td>{html.escape(stage)}</td><td>{html.escape(name.replace('_', ' '))}</td>"
        f"<td class=number>{number(value)}</td></tr>"
        for stage, values in figures.items()
        for name, value in values.items()
        if isinstance(value, int | float)
    )
    return table(["<tr><th>stage</th><th>figure</th><th class=number>value</th></tr>", *rows])
