"""The four families of diffusion on Fashion-MNIST, one after the other, side by side: a sheet and a table.

usage: python scripts/fashion_families.py [--recipe pipelines/fashion.toml] [--data FOLDER] [--out runs/fashion]
           [--only ddpm,ve,vdm,flow] [--sheet docs/fashion.png]

Trains the recipe once for each value of its key `objective` into OUT/OBJECTIVE (what is done is not done again), then
draws the four sheets into one picture and prints the table of docs/diffusion.md: bits a dimension on held-out pictures
given their class, ± one standard error.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from latentgen.errors import InputError
from latentgen.pixels.build import train

ROOT = Path(__file__).parents[1]
FAMILIES = {"ddpm": "DDPM", "ve": "VE/NCSN", "vdm": "VDM", "flow": "rectified flow"}
TERMS = {
    "bound_prior": "prior",
    "bound_diffusion": "diffusion",
    "bound_reconstruction": "reconstruction",
    "bound_total": "bound",
    "ode": "ODE",
}
LINE, GAP = 18, 8


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each family."""
    lines = [f"| family | {' | '.join(TERMS.values())} |", "|---|" + "---|" * len(TERMS)]
    for name, found in figures.items():
        cells = (f"{found[term]:.3f} ± {found[f'{term}_error']:.3f}" for term in TERMS)
        lines.append(f"| {FAMILIES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def side_by_side(sheets: Mapping[str, Image.Image]) -> Image.Image:
    """The sheets two a row, each under its family's name."""
    width, height = next(iter(sheets.values())).size
    rows = -(-len(sheets) // 2)
    whole = Image.new("RGB", (2 * width + GAP, rows * (height + LINE + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=13)
    for number, (name, sheet) in enumerate(sheets.items()):
        x, y = number % 2 * (width + GAP), number // 2 * (height + LINE + GAP)
        pen.text((x + 2, y), FAMILIES[name], fill="black", font=font)
        whole.paste(sheet, (x, y + LINE))
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on standard error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, default=ROOT / "pipelines/fashion.toml", help="the recipe")
    options.add_argument("--data", type=Path, help="a folder of pictures captioned by class (the recipe's)")
    options.add_argument("--out", type=Path, default=ROOT / "runs/fashion", help="where the weights folders go")
    options.add_argument("--only", default=",".join(FAMILIES), help="families, with commas between them")
    options.add_argument("--sheet", type=Path, default=ROOT / "docs/fashion.png", help="the picture to draw")
    given = options.parse_args(arguments)
    chosen = [name.strip() for name in given.only.split(",")]
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        print(f"fashion_families: no family {unknown[0]!r}; there is {', '.join(FAMILIES)}", file=sys.stderr)
        return 2

    def report(line: object) -> None:
        print(line, file=sys.stderr, flush=True)

    figures, sheets = {}, {}
    try:
        given.sheet.parent.mkdir(parents=True, exist_ok=True)  # before the hours
        for name in chosen:
            cache = given.out / "cache"
            folder = train(given.recipe, given.out / name, given.data, report, cache=cache, objective=name)
            figures[name] = json.loads((folder / "metrics.json").read_text())["likelihood"]
            with Image.open(folder / "sheet.png") as sheet:
                sheets[name] = sheet.convert("RGB")
        print(table(figures))
        side_by_side(sheets).save(given.sheet, optimize=True)
    except (InputError, OSError) as error:
        print(f"fashion_families: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
