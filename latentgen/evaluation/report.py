"""An evaluation as one HTML page that needs nothing beside it: figures, curves, pictures."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from latentgen.evaluation.run import Evaluation

SHOWN = 24  # pictures of each sheet
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; margin: 0 auto; max-width: 72rem; padding: 1.5rem }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left }
td.number { font-variant-numeric: tabular-nums; text-align: right } figcaption, p { color: #555 }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; font-size: .8em; max-width: 20rem }
img { width: 96px; border: 1px solid #ddd; margin-right: 2px }
"""
COLOURS = ("#0b6bcb", "#c2410c")


def write_report(one: Evaluation, other: Evaluation | None = None) -> str:
    """The page of one evaluation, or of two of the same data next to each other."""
    both = [one] if other is None else [one, other]
    names = " and ".join(html.escape(each.name) for each in both)
    body = [f"<h1>{names}</h1>", *(f"<p>{html.escape(settings(each))}</p>" for each in both), figures(both)]
    body += ["<h2>loss by noise level</h2>", curve(both)]
    order = np.argsort(one.likeness)
    some = np.random.default_rng(0).permutation(len(order))
    sheets = (("random", some), ("best", order[::-1]), ("worst", order))
    what = "; ".join(["the real held-out picture", *(f"by {html.escape(each.name)}" for each in both)])
    for name, rows in sheets:
        body.append(f"<h2>{name}</h2><p>Left to right: {what}. Best and worst are by likeness of features.</p>")
        body += [figure(one.captions[k], [one.real[k], *(each.renderings[k] for each in both)]) for k in rows[:SHOWN]]
    for each in both:
        body.append(f"<h2>{html.escape(each.name)}: nearest training pictures</h2>")
        body.append(
            f"<p>The rendering, then what it is nearest to; nearer than {each.copies.limit:.3g} is flagged.</p>"
        )
        for k in np.argsort(each.copies.distance)[:SHOWN]:
            flag = " — flagged" if each.copies.flagged[k] else ""
            said = f"{each.copies.distance[k]:.3g}{flag}: {each.captions[k]}"
            body.append(figure(said, [each.renderings[k], np.asarray(each.training[each.copies.nearest[k]])]))
    head = f'<meta charset="utf-8"><title>{names}</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def settings(of: Evaluation) -> str:
    """One line of what was asked."""
    told = {key: "its own" if value is None else value for key, value in of.settings.items()}
    return f"{of.name}: " + ", ".join(f"{key} {value}" for key, value in told.items())


def figures(both: Sequence[Evaluation]) -> str:
    """The table."""
    head = "".join(f"<th>{html.escape(each.name)}</th><th>95%</th><th>pictures</th>" for each in both)
    rows = []
    for name in dict.fromkeys(name for each in both for name in each.figures):
        cells = ""
        for each in both:
            found = each.figures.get(name)
            told = ("", "", "")
            if found is not None:
                told = (f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}", str(found.count))
            cells += "".join(f"<td class=number>{cell}</td>" for cell in told)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return f"<h2>figures</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def curve(both: Sequence[Evaluation]) -> str:
    """Loss over the schedule's time, clean to noise, as inline SVG."""
    top = max(level.loss.high for each in both for level in each.levels) or 1.0
    lines = []
    for each, colour in zip(both, COLOURS, strict=False):
        places = [(40 + 540 * level.time, 180 - 160 * level.loss.value / top) for level in each.levels]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
    axis = '<path d="M40 20V180H580" fill="none" stroke="#999"/>'
    words = f'<text x="2" y="26" font-size="11">{top:.3g}</text><text x="40" y="196" font-size="11">clean</text>'
    words += '<text x="548" y="196" font-size="11">noise</text>'
    return f'<svg viewBox="0 0 600 200" width="600" role="img">{axis}{"".join(lines)}{words}</svg>'


def figure(caption: str, pictures: Iterable[np.ndarray]) -> str:
    """Pictures side by side over their caption."""
    shown = "".join(f'<img src="data:image/png;base64,{encoded(pixels)}" alt="">' for pixels in pictures)
    return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>"


def encoded(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
