"""Rendering against stable-diffusion.cpp, at Stable Diffusion 1.5's shape with random weights: seconds a step.

    pip install stable-diffusion-cpp-python      # builds from source, for this CPU
    python scripts/benchmark_sdcpp.py [--form sd15] [--steps 3] [--rounds 1] [--type f32] [--direct] [--json FILE]

Each engine in a process of its own, in turn. Two pictures are rendered, of N and of 2·N guided steps, after one that
warms up; what they differ by is N steps, and the rest is text and decoding. stable-diffusion.cpp opens the single file
that `latentgen convert` makes of the folder, and evaluates the two halves of guidance one after the other. --type: what
it keeps weights in. --direct: its convolutions without im2col. The ratio is stable-diffusion.cpp to latentgen: above 1
latentgen is faster. The pictures are not compared: its noise is its own, and random weights draw nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmark_forms import FORMS, form_folder
from benchmark_process import guarded, in_turn, paired_ratio, peak_mib, run, show

from latentgen.checkpoint import open_folder
from latentgen.errors import InputError

OTHER = "stable-diffusion.cpp"
ENGINES = ("latentgen", OTHER)
PROMPT, GUIDANCE = "a red apple", 4.0
Render = Callable[[int, int], None]  # a side in pixels and steps


def ours(asked: argparse.Namespace) -> Render:
    """latentgen's Pipeline on the folder."""
    from latentgen.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(asked.folder)

    def render(side: int, steps: int) -> None:
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "sampler": "euler"}
        pipe(PROMPT, height=side, width=side, seed=0, guidance_interval=(0.0, 1.0), **call)

    return render


def theirs(asked: argparse.Namespace) -> Render:
    """stable-diffusion.cpp on the single file, on as many threads as there are cores."""
    import os

    from stable_diffusion_cpp import StableDiffusion

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = StableDiffusion(
        model_path=str(asked.folder.with_suffix(".safetensors")),
        n_threads=threads,
        wtype=asked.type,
        diffusion_conv_direct=asked.direct,
        vae_conv_direct=asked.direct,
        verbose=False,
    )

    def render(side: int, steps: int) -> None:
        call: dict[str, Any] = {"sample_steps": steps, "cfg_scale": GUIDANCE, "sample_method": "euler", "seed": 0}
        model.generate_image(prompt=PROMPT, width=side, height=side, **call)

    return render


def work(asked: argparse.Namespace) -> dict[str, Any]:
    """One worker: seconds a step, and of what is not a step."""
    render = {"latentgen": ours, OTHER: theirs}[asked.worker](asked)
    config = {part: open_folder(asked.folder, verify=False).config(part) for part in ("unet", "vae")}
    side = config["unet"]["sample_size"] * 2 ** (len(config["vae"]["block_out_channels"]) - 1)
    seconds = []
    for steps in (1, asked.steps, 2 * asked.steps):
        start = time.perf_counter()
        render(side, steps)
        seconds.append(time.perf_counter() - start)
    step = (seconds[2] - seconds[1]) / asked.steps
    return {"step": step, "rest": seconds[1] - asked.steps * step, "peak_mib": peak_mib(), "side": side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=tuple(FORMS), default="sd15", help="of the random weights")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="pairs of processes")
    parser.add_argument("--type", choices=("f32", "f16", "q8_0", "default"), default="f32")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(work(asked)))
        return
    if min(asked.steps, asked.rounds) < 1:
        raise InputError("--steps and --rounds must be 1 or more")
    if find_spec("stable_diffusion_cpp") is None:
        raise InputError("stable-diffusion.cpp is not installed: pip install stable-diffusion-cpp-python")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(str(form_folder(asked.form, None, Path(scratch), graphs=True)))
        single = str(folder.with_suffix(".safetensors"))
        run([sys.executable, "-m", "latentgen.cli", "convert", str(folder), single])
        pairs = in_turn(__file__, [*sys.argv[1:], "--folder", str(folder)], asked.rounds, ENGINES)
    figures = {"step": "seconds a guided step", "rest": "seconds of text and decoding", "peak_mib": "peak memory, MiB"}
    rows = {
        said: {engine: statistics.median(pair[engine][key] for pair in pairs) for engine in ENGINES}
        for key, said in figures.items()
    }
    ratio = paired_ratio(pairs, "step", OTHER, "latentgen")
    result = {"machine": {OTHER: version("stable-diffusion-cpp-python"), "type": asked.type}, "pairs": pairs}
    side = pairs[0]["latentgen"]["side"]
    show(f"{asked.form} at {side} px", rows, f"ratio {OTHER}/latentgen {ratio:.2f} a step", result, asked.json, ENGINES)


if __name__ == "__main__":
    guarded(main)
