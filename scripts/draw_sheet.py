"""The sheet of forty everyday prompts in README: animals, food, faces, vehicles, tools, weather, in nine styles.

usage: python scripts/draw_sheet.py [--weights FOLDER] [--out docs/icons.png] [--seed 0] [--scale 1]
"""

import argparse
from pathlib import Path

from PIL import Image

from latentgen import Pipeline
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


def main() -> None:
    """Render every subject once, the styles taking turns, and lay the pictures out ten in a row."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--weights", help="a weights folder; the embedded one if not given")
    options.add_argument("--out", type=Path, default=Path("docs/icons.png"))
    options.add_argument("--seed", type=int, default=0, help="of the first picture; picture k has seed + k")
    options.add_argument("--scale", type=int, default=1, help="how many times larger the pictures are shown")
    given = options.parse_args()
    prompts = [f"{subject}, {STYLES[number % len(STYLES)]}" for number, subject in enumerate(SUBJECTS)]
    pipe = Pipeline.from_pretrained(given.weights)
    pictures = [pipe(prompt, seed=given.seed + number).images[0] for number, prompt in enumerate(prompts)]
    sides = [(given.scale * picture.width, given.scale * picture.height) for picture in pictures]
    shown = [picture.resize(side, Image.Resampling.LANCZOS) for picture, side in zip(pictures, sides, strict=True)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown, 10, prompts).save(given.out, optimize=True)
    print(given.out)


if __name__ == "__main__":
    main()
