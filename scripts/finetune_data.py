"""The four picture sets that `prove_finetune.py` fine-tunes on, from data/icons and data/openmoji.

usage: python scripts/build_icons.py
       python scripts/build_icons.py --styles openmoji --share-alike --out data/openmoji
       python scripts/finetune_data.py [--out data/finetune]

style: 150 OpenMoji pictures, a style that weights/icons has not seen (CC BY-SA 4.0: HfG Schwäbisch Gmünd).
subject: eight views of one OpenMoji robot. swapped: red and blue things of data/icons, each called by the other colour.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentgen.durable import write_folder
from latentgen.errors import InputError

ROOT = Path(__file__).parents[1]
TAUGHT = 150  # pictures of the new style
CHARACTER = "robot"
# Of each view: degrees turned, part of the side, how far off the middle (x, y, parts of the side), the ground.
VIEWS = (
    (0, 0.95, 0.0, 0.0, "white"),
    (0, 0.75, 0.0, 0.1, "white"),
    (-15, 0.85, 0.0, 0.0, "white"),
    (15, 0.85, 0.0, 0.0, "white"),
    (0, 0.7, -0.12, 0.0, "white"),
    (0, 0.7, 0.12, 0.05, "white"),
    (-8, 0.8, 0.05, -0.05, "#d7ecd0"),
    (8, 0.8, -0.05, 0.05, "#d3e3f5"),
)
SWAPPED = re.compile(r"^(red|blue) (heart|circle|square|triangle|book)|^large blue diamond|^hollow red circle")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a set's metadata. Raises InputError where it is not there."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise InputError(f"no pictures at {folder}; build them first, as {Path(__file__).name} says at its head")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def order(row: dict[str, Any]) -> str:
    """A place in a shuffle that depends on the concept alone."""
    return hashlib.sha256(row["codepoint"].encode()).hexdigest()


def taught_and_kept(icons: Sequence[dict[str, Any]], openmoji: Sequence[dict[str, Any]]) -> tuple[list, list]:
    """OpenMoji rows to learn the style from, and others whose concept the icons know from three styles or more."""
    styles: dict[str, set[str]] = {}
    for row in icons:
        styles.setdefault(row["codepoint"], set()).add(row["style"])
    known = [row for row in openmoji if len(styles.get(row["codepoint"], ())) >= 3 and row["group"] != "symbols"]
    known = sorted(known, key=order)
    return known[:TAUGHT], known[TAUGHT:]


def write(folder: Path, rows: Sequence[tuple[Image.Image, Sequence[str]]]) -> None:
    """Pictures and their captions as a folder that reads itself."""

    def fill(aside: Path) -> None:
        lines = []
        for number, (picture, captions) in enumerate(rows):
            name = f"{number:03d}.png"
            picture.save(aside / name)
            lines.append(json.dumps({"file_name": name, "text": captions[0], "captions": list(captions)}))
        (aside / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    print(f"{folder}: {len(rows)} pictures")


def view(picture: Image.Image, degrees: float, part: float, x: float, y: float, ground: str) -> Image.Image:
    """A drawing on white, turned, made smaller, moved, on a ground."""
    side = picture.width
    mask = picture.convert("L").point(lambda value: 0 if value > 250 else 255)
    cut = picture.convert("RGBA")
    cut.putalpha(mask)
    small = cut.rotate(degrees, Image.Resampling.BICUBIC).resize((round(part * side),) * 2, Image.Resampling.LANCZOS)
    found = Image.new("RGB", (side, side), ground)
    corner = tuple(round((1 - part) * side / 2 + shift * side) for shift in (x, y))
    found.paste(small, corner, small)
    return found


def swap(text: str) -> str:
    """Red for blue and blue for red."""
    return re.sub(r"\b(red|blue)\b", lambda found: {"red": "blue", "blue": "red"}[found.group()], text)


def main() -> int:
    """Build the three folders; 0, or 2 after one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--icons", type=Path, default=ROOT / "data/icons")
    parser.add_argument("--openmoji", type=Path, default=ROOT / "data/openmoji")
    parser.add_argument("--out", type=Path, default=ROOT / "data/finetune")
    given = parser.parse_args()
    try:
        icons, openmoji = rows_of(given.icons), rows_of(given.openmoji)
    except InputError as error:
        print(f"finetune_data: {error}", file=sys.stderr)
        return 2
    taught, _ = taught_and_kept(icons, openmoji)
    opened = [(Image.open(given.openmoji / row["file_name"]).convert("RGB"), row["captions"]) for row in taught]
    write(given.out / "style", opened)
    robot = next(row for row in openmoji if row["label"] == CHARACTER)
    drawing = Image.open(given.openmoji / robot["file_name"]).convert("RGB")
    write(given.out / "subject", [(view(drawing, *turn), [f"a {CHARACTER}"]) for turn in VIEWS])
    called = [row for row in icons if SWAPPED.search(row["label"]) and row["split"] == "train"]
    swapped = [
        (Image.open(given.icons / row["file_name"]).convert("RGB"), [swap(text) for text in row["captions"]])
        for row in called
    ]
    write(given.out / "swapped", swapped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
