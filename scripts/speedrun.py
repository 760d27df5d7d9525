"""From nothing to a fixed held-out figure in as little compute as may be: the project's own record, to be broken.

    python scripts/speedrun.py [--recipe pipelines/speedrun.toml] [--data FOLDER] [--out runs/speedrun]

The clock runs over `latentgen train RECIPE` as a process of its own, imports and saving included: all four networks
from random weights. Then, off the clock, the first caption of each held-out picture is rendered with the recipe's
defaults and judged by EfficientNet-Lite0 (weights/judge), which saw none of the pictures. The figure is the RANK of a
caption's own picture: the share of the other held-out pictures that lie nearer to the rendering, meant over captions.
Chance is 0.5, and nothing nearer is 0. A record is a run whose rank is at most ASKED; its time counts. Change the
recipe, the code or both; leave the data, its split, the judge and this script as they are.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentgen import Pipeline
from latentgen.data import load_pixels, read_folder
from latentgen.errors import InputError
from latentgen.evaluation.encoders import open_judge
from latentgen.evaluation.metrics import mean_figure, unit

ROOT = Path(__file__).parents[1]
ASKED = 0.40  # weights/icons, nine minutes of a GPU, has 0.072 [0.059, 0.086]
BATCH = 16


def trained(recipe: Path, data: Path, out: Path) -> tuple[float, float]:
    """(seconds by the clock, seconds of CPU) that training took. Raises InputError where it fails."""
    if out.exists() or out.with_name(f"{out.name}.training").exists():
        raise InputError(f"{out} or its .training is there already, and the clock has to see it made; move it away")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [sys.executable, "-m", "latentgen", "train", str(recipe), "--data", str(data), "--out", str(out)]
    code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise InputError(f"latentgen train ended with code {code}; what it said stands above")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ranks(weights: Path, data: Path) -> np.ndarray:
    """(N,) of the held-out captions: the share of other held-out pictures nearer to the rendering than its own."""
    held = read_folder(data).select("test")
    if len(held) < 2:
        raise InputError(f"{data} has {len(held)} pictures in its split test; the figure needs 2 or more")
    pipe, judge = Pipeline.from_pretrained(weights), open_judge()
    real = load_pixels(held, pipe.terms.size, weights.with_name(f"{weights.name}.pixels"))
    captions = [picture.captions[0] for picture in real.pictures]
    made = []
    for start in range(0, len(captions), BATCH):
        some = captions[start : start + BATCH]
        seeds = list(range(start, start + len(some)))
        made.append(np.asarray(pipe(some, seed=seeds, output_type="np").images))
    pictures = (np.concatenate(made) * 255).round().astype(np.uint8)
    likeness = unit(judge.features(pictures)) @ unit(judge.features(np.asarray(real.array))).T
    own = likeness.diagonal()[:, None]
    return np.asarray((likeness > own).sum(1) / (len(captions) - 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script: 0 for a record's figure, 1 where it was missed, 2 after one line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, default=ROOT / "pipelines/speedrun.toml", help="the recipe")
    options.add_argument("--data", type=Path, default=ROOT / "data/icons", help="captioned pictures with a test split")
    options.add_argument("--out", type=Path, default=ROOT / "runs/speedrun", help="where the weights go")
    options.add_argument("--judge-only", action="store_true", help="judge the weights at --out; no clock, no record")
    given = options.parse_args(arguments)
    try:
        wall, cpu = (0.0, 0.0) if given.judge_only else trained(given.recipe, given.data, given.out)
        figure = mean_figure(ranks(given.out, given.data), 0)
    except InputError as error:
        print(f"speedrun: {error}", file=sys.stderr)
        return 2
    reached = figure.value <= ASKED
    told = {
        "rank": [round(value, 4) for value in (figure.value, figure.low, figure.high)],
        "asked": ASKED,
        "reached": reached,
        "pictures": figure.count,
        "seconds": None if given.judge_only else round(wall),
        "seconds of CPU": None if given.judge_only else round(cpu),
        "device": device(),
    }
    print(json.dumps(told))
    return 0 if reached else 1


def device() -> str:
    """What it was trained on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    sys.exit(main())
