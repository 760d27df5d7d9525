"""A run as one HTML page that needs nothing beside it: figures, curves of every stage, sheets, the recipe."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 640, 240, 44  # of a plot, in CSS pixels
COLOURS = ("#2563a8", "#c2571a", "#2e7d4f", "#8a3ffc", "#a02c4a", "#6b6b6b")
SHEETS = 6  # shown for each stage: the first, the last, and some between
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; margin: 0 auto; max-width: 72rem; padding: 1.5rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: left }
td.number { font-variant-numeric: tabular-nums; text-align: right }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top } figcaption { color: #555; font-size: .9em }
img { max-width: 100%; image-rendering: auto; border: 1px solid #ddd } svg { max-width: 100%; height: auto }
pre { background: #f5f5f7; padding: 1rem; overflow-x: auto }
"""


def write_page(name: str, state: Path, figures: Mapping[str, Mapping[str, float]], recipe: Mapping[str, Any]) -> str:
    """The page of a run, from its logs and sheets. state: the run's own folder; figures: by stage; recipe: resolved."""
    stages = [(stage, place) for stage in figures if (place := _place(state, stage)) is not None]
    body = [f"<h1>{html.escape(name)}: how it was trained</h1>", _table(figures)]
    for stage, place in stages:
        body.append(f"<h2>{html.escape(stage)}</h2>")
        body += _plots(_entries(place / "log.jsonl"))
        body += _sheets(place / "sheets")
    body.append(f"<h2>recipe</h2><pre>{html.escape(json.dumps(recipe, indent=2, ensure_ascii=False))}</pre>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(name)}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def curve_plot(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, *, log: bool = False) -> str:
    """Curves of (step, value) as an SVG with axes; what is not finite, or not above 0 on a log axis, is left out."""
    kept = {
        name: [(x, math.log10(y) if log else y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        for name, points in curves.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(x: float, y: float) -> str:
        across = MARGIN + (x - left) / (right - left or 1) * (WIDTH - MARGIN - 10)
        down = HEIGHT - 24 - (y - low) / (high - low) * (HEIGHT - 48)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for turn in range(5):
        value = low + (high - low) * turn / 4
        x, y = place(left, value).split(",")
        parts.append(f'<line x1="{x}" x2="{WIDTH - 10}" y1="{y}" y2="{y}" stroke="#e5e5e5"/>')
        shown = 10**value if log else value
        parts.append(f'<text x="{MARGIN - 4}" y="{float(y) + 4:.1f}" text-anchor="end">{shown:.3g}</text>')
    for step, anchor in ((left, "start"), (right, "end")):
        parts.append(
            f'<text x="{place(step, low).split(",")[0]}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>'
        )
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f'<text x="{MARGIN + 130 * number}" y="14" fill="{colour}">{html.escape(name)}</text>'
        parts.append(label)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    drawn = f'<svg {size} font-size="11" font-family="system-ui, sans-serif" role="img">{"".join(parts)}</svg>'
    return f"<figure>{drawn}<figcaption>{html.escape(title)}</figcaption></figure>"


def smoothed(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours: a noisy curve that can be read."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _place(state: Path, stage: str) -> Path | None:
    """The folder of a stage: the one worked in last, where there are several."""
    logs = [path.parent for path in state.glob(f"{stage}-*/log.jsonl")]
    return max(logs, key=lambda place: (place / "log.jsonl").stat().st_mtime, default=None)


def _entries(log: Path) -> list[dict[str, float]]:
    """The log's lines. Where a run went back to a checkpoint the later line of a step counts."""
    merged: dict[tuple[float, bool], dict[str, float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        merged[entry["step"], "norm" in entry] = entry
    return [merged[key] for key in sorted(merged)]


def _plots(entries: Sequence[Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(key for entry in entries for key in entry if key != "step"))
    curves = {name: [(entry["step"], entry[name]) for entry in entries if name in entry] for name in names}
    losses = {name: smoothed(curves[name]) for name in ("loss",) if name in curves}
    losses |= {name: curves[name] for name in ("validation_loss",) if name in curves}
    rest = [name for name in names if name not in ("loss", "validation_loss", "rate", "norm")]
    plots = [curve_plot(losses, "loss")]
    plots += [
        curve_plot({name: smoothed(curves[name])}, name.replace("_", " ")) for name in rest if len(curves[name]) > 1
    ]
    plots += [curve_plot({"norm": smoothed(curves.get("norm", []))}, "gradient norm", log=True)]
    return [*plots, curve_plot({"rate": curves.get("rate", [])}, "learning rate")]


def _sheets(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.png"))
    chosen = sorted({round(turn * (len(found) - 1) / (SHEETS - 1)) for turn in range(SHEETS)}) if found else []
    return [
        f'<figure><img src="data:image/png;base64,{base64.b64encode(found[k].read_bytes()).decode()}">'
        f"<figcaption>{html.escape(found[k].stem)}</figcaption></figure>"
        for k in chosen
    ]


def _table(figures: Mapping[str, Mapping[str, float]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(stage)}</td><td>{html.escape(name.replace('_', ' '))}</td>"
        f'<td class="number">{value:.4g}</td></tr>'
        for stage, values in figures.items()
        for name, value in values.items()
        if isinstance(value, int | float)
    )
    return f"<table><tr><th>stage</th><th>figure</th><th>value</th></tr>{rows}</table>"
