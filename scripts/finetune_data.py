"""The picture sets that `prove_finetune.py` fine-tunes on, from data/icons, data/openmoji and a pen of its own.

usage: python scripts/build_icons.py
       python scripts/build_icons.py --styles openmoji --share-alike --out data/openmoji
       python scripts/finetune_data.py [--out data/finetune]

style: 150 OpenMoji pictures, a style that weights/icons has not seen (CC BY-SA 4.0: HfG Schwäbisch Gmünd).
subject: eight pictures of one robot, drawn here, in eight poses. swapped: red and blue things of data/icons, each
called by the other colour.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from latentgen.durable import write_folder
from latentgen.errors import InputError
from latentgen.training.finish import notice_of

ROOT = Path(__file__).parents[1]
TAUGHT = 150  # pictures of the new style
CHARACTER = "robot"
PEN = 1024  # pixels a side that the character is drawn at
SIDE = 128


@dataclass(frozen=True)
class Pose:
    """How the character stands: degrees leant, its part of the side, how far off the middle (parts of the side), where
    it looks (-1 to 1, x and y), how its arms are lifted (degrees, left and right), the ground's colour.
    """

    lean: float = 0
    part: float = 0.95
    off: tuple[float, float] = (0, 0)
    look: tuple[float, float] = (0, 0)
    arms: tuple[float, float] = (-35, -35)
    ground: str = "white"


POSES = (
    Pose(),
    Pose(look=(-0.8, 0.2), arms=(40, -35)),
    Pose(look=(0.8, 0.2), arms=(-35, 40)),
    Pose(part=0.8, off=(0, 0.06), look=(0, -0.8), arms=(50, 50)),
    Pose(lean=-12, part=0.85, look=(0.5, 0.5)),
    Pose(lean=12, part=0.85, arms=(0, -20)),
    Pose(part=0.75, off=(-0.1, 0.05), look=(0.8, 0), arms=(-20, 20), ground="#d7ecd0"),
    Pose(part=0.75, off=(0.1, 0.05), look=(-0.8, 0), arms=(20, -20), ground="#d3e3f5"),
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


def write(folder: Path, rows: Sequence[tuple[Image.Image, Sequence[str]]], notice: str = "") -> None:
    """Pictures and their captions as a folder that reads itself; whose the pictures are in its NOTICE."""

    def fill(aside: Path) -> None:
        lines = []
        for number, (picture, captions) in enumerate(rows):
            name = f"{number:03d}.png"
            picture.save(aside / name)
            lines.append(json.dumps({"file_name": name, "text": captions[0], "captions": list(captions)}))
        (aside / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if notice:
            (aside / "NOTICE").write_text(notice, encoding="utf-8")

    write_folder(folder, fill)
    print(f"{folder}: {len(rows)} pictures")


def taken(source: Path, changed: str) -> str:
    """The NOTICE of pictures of another set: what was changed, and the other's, word for word."""
    return f"{changed}\n\n{notice_of(source)}"


def character(pose: Pose) -> Image.Image:
    """A robot with an orange head, one eye, a green lamp and a violet body: SIDE pixels a side."""
    drawing = Image.new("RGBA", (PEN, PEN))
    pen = ImageDraw.Draw(drawing)
    for sign, lifted in zip((-1, 1), pose.arms, strict=True):
        turn = math.radians(lifted)
        shoulder = (512 + sign * 170, 640)
        hand = (shoulder[0] + sign * 230 * math.cos(turn), shoulder[1] - 230 * math.sin(turn))
        pen.line((*shoulder, *hand), fill="#5b3a9e", width=80)
        pen.ellipse(circle(hand, 62), fill="#f2b632")
    for x in (430, 594):
        pen.rounded_rectangle((x - 55, 800, x + 55, 985), 45, fill="#3a2470")
    pen.rounded_rectangle((320, 520, 704, 860), 80, fill="#7a4fd0")
    pen.rounded_rectangle((430, 610, 594, 740), 30, fill="#f2b632")
    pen.line((512, 70, 512, 180), fill="#8a4a12", width=36)
    pen.ellipse(circle((512, 75), 60), fill="#3fbf4f")
    pen.rounded_rectangle((262, 150, 762, 550), 150, fill="#f28322")
    pen.ellipse(circle((512, 345), 150), fill="white")
    pen.ellipse(circle((512 + 70 * pose.look[0], 345 + 70 * pose.look[1]), 78), fill="#20242c")
    side = round(pose.part * PEN)
    small = drawing.rotate(pose.lean, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
    found = Image.new("RGB", (PEN, PEN), pose.ground)
    x, y = ((PEN - side) // 2 + round(shift * PEN) for shift in pose.off)
    found.paste(small, (x, y), small)
    return found.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def circle(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    """The box of a circle."""
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


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
    notice = taken(given.openmoji, "A part of the pictures of OpenMoji, their captions as there. What is said of all:")
    write(given.out / "style", opened, notice)
    write(given.out / "subject", [(character(pose), [f"a {CHARACTER}"]) for pose in POSES])
    called = [row for row in icons if SWAPPED.search(row["label"]) and row["split"] == "train"]
    swapped = [
        (Image.open(given.icons / row["file_name"]).convert("RGB"), [swap(text) for text in row["captions"]])
        for row in called
    ]
    notice = taken(
        given.icons, "Some of these pictures; in their captions red and blue are swapped. What is said of all:"
    )
    write(given.out / "swapped", swapped, notice)
    return 0


if __name__ == "__main__":
    sys.exit(main())
