"""The page and the card of a fine-tuning run: before and after, two curves, what was chosen, what was proved."""

import base64
import html
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentgen.finetuning.settings import Finetune
from latentgen.page import curve_plot, document, table
from latentgen.training.finish import CREDITS, FIRST_CREDITS, credited
from latentgen.training.log import entries
from latentgen.training.report import smoothed
from latentgen.training.stage import duration


@dataclass(frozen=True)
class Told:
    """What there is to tell of a run."""

    name: str
    method: str
    base: str
    pictures: int
    ledger: str
    reasons: Sequence[str]
    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    proof: str
    use: str
    seconds: float
    held: int = 0
    credits_before: str = ""  # whose pictures the starting weights learned from
    notice: str = ""  # of the pictures

    @property
    def judged(self) -> str:
        """What the validation loss is measured on."""
        return f"{self.held} held-out pictures" if self.held else "the pictures trained on (none is held out)"

    def card(self) -> str:
        """README.md of the folder."""
        rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in self.figures.items())
        return (
            f"# {self.name}\n\n{self.method} of `{self.base}` on {self.pictures} pictures, in {duration(self.seconds)}."
            f"\n\n```\n{self.use}\n```\n\n![Above: the starting weights. Below: these.](sheet.png)\n\n"
            f"| figure | value |\n|---|---|\n{rows}\n\n{self.proof}\n\nWhose the pictures are, and what may be done "
            "with what was learned from them, is for who trained it to say.\n"
            f"{credited(FIRST_CREDITS, self.credits_before)}{credited(CREDITS, self.notice)}"
        )


def write_page(told: Told, place: Path, sheet: Path) -> str:
    """One HTML page that needs nothing beside it. place: the stage's folder, for its log and sheets."""
    title = f"{told.name}: {told.method} of {told.base}"
    logged = entries(place / "log.jsonl")
    rows = [
        f'<tr><td>{html.escape(name.replace("_", " "))}</td><td class="number">{value:.4g}</td></tr>'
        for name, value in told.figures.items()
    ]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(told.ledger)}; {duration(told.seconds)} in all.</p>",
        f"<pre>{html.escape(told.use)}</pre>",
        "<h2>before and after</h2>",
        _picture(sheet, "above: the starting weights; below: what was saved; fixed noise"),
        "<h2>what it learned, what it forgot</h2>",
        f"<p>The validation loss is that on {told.judged}"
        + (
            ": where it rises, the pictures are learned by heart. "
            if told.held
            else "; learning by heart does not show. "
        )
        + "The loss on the starting weights' own renderings says what was forgotten.</p>",
        f'<div class="plots">{"".join(_curves(logged, told))}</div>',
        table(rows),
        "<h2>proof</h2>",
        f"<p>{html.escape(told.proof)}</p>",
        "<h2>what was chosen, and why</h2>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in told.reasons) + "</ul>",
        f"<pre>{html.escape(json.dumps(told.settings, indent=2, ensure_ascii=False))}</pre>",
        "<h2>on the way</h2>",
        *(_picture(path, path.stem) for path in _spread(sorted((place / "sheets").glob("*.png")))),
    ]
    return document(title, body)


def _curves(logged: Sequence[Mapping[str, float]], told: Told) -> list[str]:
    plots = []
    for name, title in (("validation_loss", told.judged), ("prior_loss", "the starting weights' renderings")):
        points = [(entry["step"], entry[name]) for entry in logged if name in entry]
        if f"{name}_before" in told.figures:
            points = [(0.0, told.figures[f"{name}_before"]), *points]
        plots.append(curve_plot({name: points}, f"loss on {title}"))
    trained = [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
    return [*plots, curve_plot({"loss": smoothed(trained)}, "training loss")]


def _spread(paths: Sequence[Path], most: int = 4) -> list[Path]:
    chosen = sorted({round(turn * (len(paths) - 1) / (most - 1)) for turn in range(most)}) if paths else []
    return [paths[k] for k in chosen]


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    says = html.escape(caption, quote=True)
    drawn = f'<img style="width: 100%" alt="{says}" src="data:image/png;base64,{data}">'
    return f"<figure>{drawn}<figcaption>{says}</figcaption></figure>"


def how_to_use(what: Finetune, prompt: str, start: str | Path | None, out: Path) -> str:
    """How the result is used, in a command. start: the weights it was begun from, where somebody named them."""
    how = {"textual-inversion": ("--word", out), "style": ("--style", f"{out}:1")}.get(what.method)
    if how is None:
        how = ("--weights" if what.adapter is None else "--lora", out)
    base = () if start is None or how[0] == "--weights" else ("--weights", start)
    quoted = subprocess.list2cmdline if sys.platform == "win32" else shlex.join  # as the shell there reads it
    return quoted([str(part) for part in ("latentgen", "render", prompt, *base, *how)])
