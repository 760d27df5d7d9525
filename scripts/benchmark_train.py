"""Training the U-Net against the way of diffusers' text-to-image example: samples a second, same network, same batch.

    python scripts/benchmark_train.py [--weights FOLDER | --form 50m|50m-sd] [--data FOLDER] [--batch 32] [--steps 10]

latentgen: `training.loop.fit` on `DenoiseObjective`, moments of latents and text states cached beforehand (the time
that takes is shown, and is not in the rate). diffusers: at each step pictures are read and captions tokenised by a
data loader, encoded by VAE and text encoder, noised by DDPMScheduler; AdamW and EMAModel step. Networks are made from
the folder's configs, with random weights: speed does not depend on them. GFLOP/s counts the U-Net alone, three times
its forward pass, for both; beside it what one large matrix product reaches in the same process, in float32 and on a GPU
in bf16, and the share of the one that it trains in. Waiting is the share of the time spent on getting the batch.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark_forms import NAMES, form_folder, matrix_peak
from benchmark_process import ENGINES, ROOT, guarded, in_turn, machine, paired_ratio, peak_mib, show

from latentgen.checkpoint import find
from latentgen.errors import InputError

WARM = 2  # steps before the clock starts


class Clock:
    """Seconds of the counted steps, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._start = time.perf_counter()

    def restart(self) -> None:
        self.waited, self._start = 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def seconds(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self._start


def work(asked: argparse.Namespace) -> dict[str, Any]:
    """One worker: networks, data, steps against the clock."""
    from accelerate import Accelerator
    from benchmark_train_ways import Parts, by_diffusers, by_latentgen

    from latentgen.data import load_pixels, read_folder

    folder = find(asked.weights)
    for part in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer"):
        if not (folder / part).exists():
            raise InputError(f"{folder} holds no {part}; give a weights folder in diffusers' layout")
    import torch

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    parts, clock = Parts.read(folder), Clock()
    with tempfile.TemporaryDirectory() as scratch:
        captioned = read_folder(asked.data)
        if len(captioned.pictures) < asked.batch:
            raise InputError(f"{asked.data} holds {len(captioned.pictures)} pictures; give --batch that or less")
        began = time.perf_counter()
        if asked.worker == "latentgen":
            pixels = load_pixels(captioned, parts.size, Path(scratch))
            progress = by_latentgen(parts, pixels, asked.batch, WARM + asked.steps, clock, accelerator, Path(scratch))
        else:
            progress = by_diffusers(parts, captioned.pictures, asked.batch, WARM + asked.steps, clock, accelerator)
        prepared = 0.0
        for step in progress:
            if step == 0:  # all is prepared: nothing has been trained yet
                prepared = time.perf_counter() - began
            if step == WARM:
                clock.seconds()  # what the device still does belongs to the warm-up
                clock.restart()
        seconds = clock.seconds()
    peak = peak_mib()  # before the operations are counted, which takes a second U-Net
    gflops = 3 * parts.forward_flops(asked.batch) * asked.steps / seconds / 1e9
    peaks = {"peak_gflops_fp32": matrix_peak(torch.float32) / 1e9}
    if torch.cuda.is_available():
        peaks["peak_gflops_bf16"] = matrix_peak(torch.bfloat16) / 1e9
    return {
        "samples_per_second": asked.batch * asked.steps / seconds,
        "gflops": gflops,
        **peaks,
        "share_of_peak": gflops / list(peaks.values())[-1],
        "waiting": clock.waited / seconds,
        "prepared_seconds": prepared,
        "peak_mib": peak,
        "machine": machine(),
    }


def measure(asked: argparse.Namespace) -> None:
    """Both ways in turn; a table and JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = form_folder(asked.form, asked.weights, Path(scratch), graphs=False)
        given = [] if folder is None else ["--weights", folder]
        pairs = in_turn(__file__, [*sys.argv[1:], *given], asked.rounds)
    names = {
        "samples_per_second": "samples a second",
        "gflops": "GFLOP/s of the U-Net",
        "peak_gflops_fp32": "a large matrix product, float32",
        "peak_gflops_bf16": "a large matrix product, bf16",
        "share_of_peak": "share of that of the U-Net",
        "waiting": "share of time waiting for data",
        "prepared_seconds": "seconds before the first step",
        "peak_mib": "peak memory, MiB",
    }
    names = {key: said for key, said in names.items() if key in pairs[0]["latentgen"]}  # bf16 on a GPU alone
    medians = {key: {e: statistics.median(pair[e][key] for pair in pairs) for e in ENGINES} for key in names}
    ratio = paired_ratio(pairs, "samples_per_second", "latentgen", "diffusers")
    where = pairs[0]["latentgen"]["machine"]
    settings = {"batch": asked.batch, "steps": asked.steps, "rounds": asked.rounds}
    rows = {said: medians[key] for key, said in names.items()}
    title = f"training the U-Net, batch {asked.batch}, {asked.steps} steps"
    result = {**settings, "machine": where, **medians, "ratio": ratio, "pairs": pairs}
    show(title, rows, f"ratio latentgen/diffusers {ratio:.3f} in samples a second", result, asked.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a folder whose configs and tokenizer are used; default: the embedded one")
    parser.add_argument("--form", choices=NAMES, default="icons", help="the configs of this form instead")
    parser.add_argument("--data", type=Path, default=ROOT / "tests" / "data" / "icons", help="a captioned folder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help=f"counted steps, after {WARM} others")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if min(asked.batch, asked.steps, asked.rounds) < 1:
        raise InputError("--batch, --steps and --rounds must be 1 or more")
    if asked.worker:
        print(json.dumps(work(asked)))
    else:
        measure(asked)


if __name__ == "__main__":
    guarded(main)
