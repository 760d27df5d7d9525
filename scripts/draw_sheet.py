"""The sheet of forty everyday prompts in README: animals, food, faces, vehicles, tools, weather, in nine styles.

usage: python scripts/draw_sheet.py [--weights FOLDER] [--out docs/icons.png] [--seed 0] [--scale 1]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from latentgen import Pipeline
from latentgen.errors import InputError
from latentgen.training.sheet import contact_sheet

STYLES = (
    "noto emoji",
    "twemoji",
    "3d fluent emoji",
    "flat fluent emoji",
    "emojione",
    "blob emoji",
    "firefox emoji",
    "streamline sticker",
    "black and white line icon",
)
SUBJECTS = (
    *("a cat", "a dog", "a fish", "a bird", "a pig", "a frog", "a butterfly", "an elephant"),
    *(
        "a red apple",
        "a banana",
        "a strawberry",
        "a pizza",
        "a hamburger",
        "an ice cream",
        "a cup of coffee",
        "a carrot",
    ),
    *("a smiling face", "an angry face", "a face with tears of joy", "a sleeping face", "a ghost", "a robot"),
    *("a red heart", "a rose", "a car", "a bicycle", "an airplane", "a rocket", "a ship", "a train"),
    *("a hammer", "a key", "scissors", "a light bulb", "a guitar", "a house", "the sun", "a cloud with rain"),
    *("a snowman", "an umbrella"),
)


def draw(weights: str | None, seed: int, scale: int) -> Image.Image:
    """Every subject once, the styles taking turns, laid out ten in a row, each side `scale` times as large."""
    if scale < 1:
        raise InputError(f"--scale is {scale}; give 1 or more")
    prompts = [f"{subject}, {STYLES[number % len(STYLES)]}" for number, subject in enumerate(SUBJECTS)]
    pipe = Pipeline.from_pretrained(weights)
    pictures = [pipe(prompt, seed=seed + number).images[0] for number, prompt in enumerate(prompts)]
    sides = [(scale * picture.width, scale * picture.height) for picture in pictures]
    shown = [picture.resize(side, Image.Resampling.LANCZOS) for picture, side in zip(pictures, sides, strict=True)]
    return contact_sheet(shown, 10, prompts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the sheet; 0, or 2 after one line on standard error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--weights", help="a weights folder; the embedded one if not given")
    options.add_argument("--out", type=Path, default=Path("docs/icons.png"))
    options.add_argument("--seed", type=int, default=0, help="of the first picture; picture k has seed + k")
    options.add_argument("--scale", type=int, default=1, help="how many times larger the pictures are shown")
    given = options.parse_args(arguments)
    try:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        draw(given.weights, given.seed, given.scale).save(given.out, optimize=True)
    except (InputError, OSError) as error:
        print(f"draw_sheet: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
