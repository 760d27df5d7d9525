"""Reports as HTML pages that need nothing beside them: one style, light and dark, from a phone's width up; curves."""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

WIDTH, HEIGHT, MARGIN = 640, 240, 52  # of a plot, in CSS pixels
SERIES = 6  # colours there are
MARKED = 24  # points of a curve, at most, that are drawn as dots
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c60; --line: #dcdce0; --back: #fff; --box: #f5f5f7 }
.c0 { color: #2563a8 } .c1 { color: #c2571a } .c2 { color: #2e7d4f } .c3 { color: #8a3ffc } .c4 { color: #a02c4a }
.c5 { color: #6b6b6b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececef; --soft: #a6a6ad; --line: #3a3a40; --back: #17171a; --box: #222226 }
  .c0 { color: #6eb0f5 } .c1 { color: #f09a5f } .c2 { color: #6cc795 } .c3 { color: #b794ff } .c4 { color: #f07f9d }
  .c5 { color: #a8a8ad }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  max-width: 72rem; padding: 1rem clamp(.8rem, 3vw, 1.5rem) 3rem }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } p, figcaption, td.what { color: var(--soft) }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) } p { max-width: 46rem }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0 }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
tr + tr > td { border-top: 1px solid var(--line) } td.number, th.number { font-variant-numeric: tabular-nums;
  text-align: right; white-space: nowrap } td.soft { color: var(--soft) }
figure { margin: 0 } figcaption { font-size: .8em; line-height: 1.35; overflow-wrap: anywhere }
figcaption b { color: var(--ink); font-weight: 600 } img { max-width: 100%; border: 1px solid var(--line) }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem }
.sheet.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)) }
.side { display: flex; gap: 2px } .side img { width: 96px; min-width: 0; flex: 0 1 96px; object-fit: contain }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink) } svg g text { fill: currentColor }
td.tile { padding: 0 2px 2px 0; border: 0 } td.tile img { width: 80px; max-width: none; display: block }
svg .grid { stroke: var(--line) } pre { background: var(--box); padding: 1rem; overflow-x: auto }
"""


HEAD = (
    '<!doctype html><html lang=en><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)
BEGINS = rf"{re.escape(HEAD)}<title>[^<]*</title><style>\n:root {{ color-scheme: light dark; --ink"  # every page here


def document(title: str, body: Iterable[str], extra_style: str = "") -> str:
    """The whole page. title is text; body is HTML. What is no character (in names of files) is told by its number."""
    head = f"{HEAD}<title>{html.escape(title)}</title><style>{STYLE}{extra_style}</style></head>"
    page = f"{head}<body>{''.join(body)}</body></html>\n"
    return page.encode(errors="backslashreplace").decode()


def table(rows: Iterable[str]) -> str:
    """Rows of HTML as a table that scrolls sideways where it does not fit."""
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def sheet(figures: Iterable[str], kind: str = "") -> str:
    """Figures in as many columns as fit; kind "pairs" is for figures of several pictures."""
    return f'<div class="{f"sheet {kind}".strip()}">{"".join(figures)}</div>'


def image(pixels: np.ndarray, says: str = "") -> str:
    """(H, W, 3) uint8 as an <img> that holds its own PNG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(says, quote=True)}">'


def curve_plot(
    curves: Mapping[str, Sequence[Sequence[float]]], title: str, *, log: bool = False, ends: tuple[str, str] = ("", "")
) -> str:
    """Curves of (x, y), or (x, y, low, high) with an interval, as an SVG with axes.

    What is None or not finite, or not above 0 on a log axis, is left out; "" where nothing is left. ends: what the
    first and the last x are called instead of their numbers.
    """
    kept = {
        name: [_logged(point) if log else point for point in points if _drawn(point, log)]
        for name, points in curves.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [point[0] for points in kept.values() for point in points]
    ys = [y for points in kept.values() for point in points for y in point[1:]]
    frame = _Frame(min(xs), max(xs), min(ys), max(ys), 22 + 14 * (len(kept) > 1))
    parts = [*frame.grid(log), *frame.feet(sorted(set(xs)), ends)]
    across = float(MARGIN)
    for number, (name, points) in enumerate(kept.items()):
        parts.append(f'<g class="c{number % SERIES}">{frame.curve(points)}')
        if len(kept) > 1:
            parts.append(f'<text x="{across:.0f}" y="14">{html.escape(name)}</text>')
            across += 22 + 6.2 * len(name)
        parts.append("</g>")
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    drawn = f'<svg {size} font-size="11" font-family="system-ui, sans-serif" role="img">{"".join(parts)}</svg>'
    return f"<figure>{drawn}<figcaption>{html.escape(title)}</figcaption></figure>"


def number(value: float, digits: int = 4) -> str:
    """A number as people write it: whole ones in full, small ones with a short power of ten."""
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    if value and abs(value) < 1e-3 and math.isfinite(value):
        digit, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{digit.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{digits}g}"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(times * unit for times in (1, 2, 2.5, 5, 10) if times * unit >= rough * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _drawn(point: Sequence[float], log: bool) -> bool:
    known = all(each is not None and math.isfinite(each) for each in point)
    return known and (not log or all(y > 0 for y in point[1:]))


def _logged(point: Sequence[float]) -> list[float]:
    return [point[0], *(math.log10(y) for y in point[1:])]


class _Frame:
    """Where numbers lie on the paper."""

    def __init__(self, left: float, right: float, low: float, high: float, top: float) -> None:
        self.left, self.right, self.top = left, right, top
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def x(self, value: float) -> float:
        return MARGIN + (value - self.left) / (self.right - self.left or 1) * (WIDTH - MARGIN - 14)

    def y(self, value: float) -> float:
        return HEIGHT - 24 - (value - self.low) / (self.high - self.low) * (HEIGHT - 24 - self.top)

    def grid(self, log: bool) -> list[str]:
        parts = []
        for value in ticks(self.low, self.high):
            y, shown = self.y(value), 10**value if log else value
            parts.append(f'<line class="grid" x1="{MARGIN}" x2="{WIDTH - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{number(shown, 3)}</text>')
        return parts

    def feet(self, xs: list[float], ends: tuple[str, str]) -> list[str]:
        """Under the axis: every x where they are few, else the first and the last."""
        places = xs if len(xs) <= 8 and not any(ends) else [xs[0], xs[-1]]
        parts = []
        for x in dict.fromkeys(places):
            first, last = x == xs[0], x == xs[-1]
            said = (ends[0] if first else ends[1] if last else "") or number(x, 4)
            anchor = "start" if first else "end" if last else "middle"
            parts.append(
                f'<text x="{self.x(x):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{html.escape(said)}</text>'
            )
        return parts

    def curve(self, points: Sequence[Sequence[float]]) -> str:
        line = " ".join(f"{self.x(point[0]):.1f},{self.y(point[1]):.1f}" for point in points)
        parts = [f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>']
        for point in points if len(points) <= MARKED else ():
            x, y = self.x(point[0]), self.y(point[1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="currentColor"/>')
            if len(point) == 4:
                ends = f'y1="{self.y(point[2]):.1f}" y2="{self.y(point[3]):.1f}"'
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="currentColor" opacity=".45"/>')
        return "".join(parts)
