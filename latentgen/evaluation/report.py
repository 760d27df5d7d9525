"""An evaluation as one HTML page that needs nothing beside it: figures, curves, pictures."""

import html
from collections.abc import Iterable, Sequence

import numpy as np

from latentgen.evaluation.metrics import Figure
from latentgen.evaluation.run import Evaluation
from latentgen.evaluation.sweep import Sweep
from latentgen.page import curve_plot, document, image, number, sheet, table

SHOWN = 24  # pictures of each sheet
REFERENCES = (" (training pictures)", " (held-out pictures)", " (real pictures)", ", real")
BETTER = {  # what the best value is; figures that are not here have none
    "Fréchet distance": "low",
    "KID": "about 0",
    "CMMD": "low",
    "precision": "high",
    "recall": "high",
    "density": "about 1",
    "coverage": "high",
    "own picture at 1": "high",
    "CLIP score": "high",
    "own caption at 1": "high",
    "memorised": "0",
    "memorised, of training captions": "0",
    "held-out pairs: concept": "high",
    "held-out pairs: concept, share": "about 1",
    "held-out pairs: style": "high",
    "held-out pairs: style, share": "about 1",
    "seen pairs: concept": "high",
    "seen pairs: concept, share": "about 1",
    "seen pairs: style": "high",
    "seen pairs: style, share": "about 1",
    "style by the probe": "high",
    "style by the probe, share": "about 1",
    "validation loss": "low",
    "bits per latent dimension, bound": "low",
    "bits per pixel dimension, bound": "low",
    "reconstruction: PSNR, dB": "high",
    "reconstruction: SSIM": "high",
    "reconstruction: Fréchet distance": "low",
    "reconstruction: feature distance": "low",
}
ABOUT = (
    "Each figure has a 95% bootstrap interval and the number of pictures behind it. In brackets: the same figure of "
    "real pictures put in the renderings' place, which says how far this judge and this number of pictures can reach. "
    "Precision, recall, density and coverage go by balls that the pictures make of each other; their intervals leave "
    "these as they are, and over other pictures the figures vary more, recall and coverage the most. "
    "Distances over different numbers of pictures cannot be compared."
)


def write_report(one: Evaluation, other: Evaluation | None = None) -> str:
    """The page of one evaluation, or of two of the same data next to each other."""
    both = [one] if other is None else [one, other]
    title = " and ".join(each.name for each in both)
    body = [f"<h1>{html.escape(title)}</h1>", settings(both), f"<h2>figures</h2><p>{ABOUT}</p>", figures(both)]
    body += ["<h2>loss by noise level</h2>", levels(both)]
    for each in both:
        body += [sweep_section(each, found) for found in each.sweeps]
    body += [*sheets(both), *(neighbours(each) for each in both)]
    return document(title, body)


def settings(both: Sequence[Evaluation]) -> str:
    """What was asked, a line each."""
    names = dict.fromkeys(name for each in both for name in each.settings)
    rows = []
    for name in names:
        cells = "".join(f"<td>{html.escape(_told(each.settings.get(name)))}</td>" for each in both)
        rows.append(f"<tr><td class=soft>{html.escape(name.replace('_', ' '))}</td>{cells}</tr>")
    return table(rows)


def _told(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    text = "" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # of a hash its beginning


def figures(both: Sequence[Evaluation]) -> str:
    """The table; a figure of real pictures stands in brackets behind the renderings' own."""
    head = "".join(
        f"<th class=number>{html.escape(each.name)}</th><th class=number>95%</th><th class=number>real</th>"
        "<th class=number>95%</th><th class=number>pictures</th>"
        for each in both
    )
    rows = []
    for name in dict.fromkeys(name for each in both for name in each.figures if not _reference(name)):
        cells = "".join(_cells(each.figures, name) for each in both)
        rows.append(f"<tr><td>{html.escape(name)}</td><td class=soft>{better(name)}</td>{cells}</tr>")
    return table([f"<tr><th></th><th>best</th>{head}</tr>", *rows])


def _reference(name: str) -> bool:
    return name.endswith(REFERENCES)


def better(name: str) -> str:
    """What the best value of a figure is, in a word; the FID is a Fréchet distance."""
    return BETTER.get(name.replace("FID", "Fréchet distance"), "")


def _cells(found: dict[str, Figure], name: str) -> str:
    figure = found.get(name)
    real = next((found[name + end] for end in REFERENCES if name + end in found), None)
    told = ["", ""] if figure is None else [number(figure.value), _interval(figure)]
    told += ["", ""] if real is None else [f"({number(real.value)})", _interval(real)]
    told.append("" if figure is None else str(figure.count))
    soft = ("", " soft", "", " soft", " soft")
    return "".join(f'<td class="number{kind}">{cell}</td>' for cell, kind in zip(told, soft, strict=True))


def _interval(figure: Figure) -> str:
    return f"{number(figure.low, 3)} to {number(figure.high, 3)}"


def levels(both: Sequence[Evaluation]) -> str:
    """Loss over the schedule's time, clean to noise."""
    found = {}
    for turn, each in enumerate(both):
        name = each.name if each.name not in found else f"{each.name} ({turn + 1})"
        found[name] = [(lv.time, lv.loss.value, lv.loss.low, lv.loss.high) for lv in each.levels]
    said = "mean squared error of the network's output, held-out pictures, over the schedule's time"
    return curve_plot(found, said, ends=("clean", "noise"))


def sweep_section(of: Evaluation, found: Sweep) -> str:
    """A curve for each figure of a sweep, and the same renderings at each value."""
    plots = []
    for name in found.points[0].figures:
        points = [
            (p.value, *(getattr(p.figures[name], part) for part in ("value", "low", "high"))) for p in found.points
        ]
        plots.append(curve_plot({name: points}, f"{name}, over {found.name}"))
    count = next(iter(found.points[0].figures.values())).count
    said = f"{count} captions at each point, with the same noise; all else as above. Lines are 95% intervals."
    rows = ["<tr><th></th>" + "".join(f"<th>{number(p.value)}</th>" for p in found.points) + "</tr>"]
    for k, caption in enumerate(found.captions):
        cells = "".join(f"<td class=tile>{image(p.renderings[k])}</td>" for p in found.points)
        rows.append(f"<tr><td class=soft>{html.escape(caption)}</td>{cells}</tr>")
    head = f"<h2>{html.escape(of.name)}: over {found.name}</h2><p>{said}</p>"
    return f'{head}<div class="plots">{"".join(plots)}</div>{table(rows)}'


def sheets(both: Sequence[Evaluation]) -> list[str]:
    """Random, best and worst renderings beside their real pictures."""
    one, body = both[0], []
    order = np.argsort(one.likeness)
    some = np.random.default_rng(0).permutation(len(order))
    what = "; ".join(["the real held-out picture", *(f"by {html.escape(each.name)}" for each in both)])
    measure = f"likeness of features to the real picture, of {html.escape(one.name)}'s renderings"
    chosen = {
        "random": (some, "Drawn by lot."),
        "best": (order[::-1], f"Highest {measure}."),
        "worst": (order, f"Lowest {measure}."),
    }
    for name, (rows, why) in chosen.items():
        body.append(f"<h2>{name}</h2><p>Left to right: {what}. {why}</p>")
        body.append(
            sheet(
                (
                    figure(
                        one.captions[k], [one.real[k], *(each.renderings[k] for each in both)], f"{one.likeness[k]:.2f}"
                    )
                    for k in rows[:SHOWN]
                ),
                "pairs",
            )
        )
    return body


def neighbours(of: Evaluation) -> str:
    """The renderings nearest to training pictures, flagged ones first; those of training captions apart."""
    said = (
        "Left to right: the rendering, and the training picture it is nearest to; nearest pairs first. Nearer than "
        f"{of.copies.limit:.3g}, as a hundredth of the training pictures are to one another, is flagged."
    )
    body = [f"<h2>{html.escape(of.name)}: nearest training pictures</h2><p>{said}</p>"]
    parts = {
        "Held-out captions": (of.captions, of.renderings, of.copies),
        "Training captions": (of.seen.captions, of.seen.renderings, of.seen.copies),
    }
    for name, (captions, renderings, copies) in parts.items():
        shown = []
        for k in np.argsort(copies.distance)[:SHOWN]:
            flag = ", flagged" if copies.flagged[k] else ""
            pair = [renderings[k], np.asarray(of.training[copies.nearest[k]])]
            shown.append(figure(captions[k], pair, f"{copies.distance[k]:.3g}{flag}"))
        count = f"{int(copies.flagged.sum())} of {len(copies.flagged)} are flagged"
        body.append(f"<p>{name}: {count}.</p>{sheet(shown, 'pairs')}")
    return "".join(body)


def figure(caption: str, pictures: Iterable[np.ndarray], measure: str = "") -> str:
    """Pictures side by side over their caption."""
    shown = "".join(image(pixels) for pixels in pictures)
    bold = f"<b>{measure}</b> " if measure else ""
    return f'<figure><div class="side">{shown}</div><figcaption>{bold}{html.escape(caption)}</figcaption></figure>'
