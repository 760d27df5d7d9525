"""A captioned folder of two classes of 8 x 8 grey pictures, and a recipe that learns it in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = """
kind = "pixels"
name = "bars"
objective = "flow"
[data]
folder = "unused"
size = 8
grey = true
[network]
blocks = "resnet"
channels = [8, 16]
head_width = 8
[diffusion]
levels = 20
[train]
steps = 6
batch = 4
rate = 2e-3
warmup = 2
ema = 0.9
[sample]
rows = 1
steps = 3
[likelihood]
pictures = 4
bound_levels = 20
bound_samples = 4
tolerance = 1e-2
[pace]
validate_steps = 3
"""


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    """32 pictures, "a bar" upright or "a beam" lying, each with its own grey; every fourth held out."""
    folder = tmp_path / "bars"
    folder.mkdir()
    lines = []
    for number in range(32):
        pixels = np.zeros((8, 8), np.uint8)
        upright, place, grey = number % 2 == 0, 1 + number // 2 % 6, 100 + 4 * number
        pixels[(slice(None), place) if upright else (place, slice(None))] = grey
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        split = "test" if number % 8 in (6, 7) else "train"
        text = "a bar" if upright else "a beam"
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": text, "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipe's file."""
    path = tmp_path / "bars.toml"
    path.write_text(RECIPE)
    return path
