"""Rendering against plain diffusers: the same weights, sampler, steps, guidance and latents; time, memory, pictures.

    python scripts/benchmark_render.py [--weights FOLDER] [--steps 25] [--batch 1] [--rounds 5] [--json FILE]
    python scripts/benchmark_render.py --form 50m            random weights in another form (benchmark_forms.py)
    python scripts/benchmark_render.py --compile             what compiling the U-Net gains, here and in diffusers
    python scripts/benchmark_render.py --feature-cache 2     what the torch engine's feature cache gains, and its price
    python scripts/benchmark_render.py --dtype bfloat16      what computing in a half type gains, and its price

A warm picture is one call of the pipeline, pixels on the host, divided by the batch; the first call is not counted.
Shell to picture is one PNG from a fresh process: `latentgen render`, and the shortest script with diffusers.
The start is what `import latentgen` and `latentgen --help` take beyond a bare Python's start: the median over runs of
all three in turn, a fresh process each.
The ratio is diffusers to latentgen, the median over the rounds: above 1 latentgen is faster. The share of the peak is
the U-Net's and the decoder's operations over the time of a warm picture, divided by what one large matrix product
reaches in the same process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_forms import NAMES, form_folder, matrix_peak, picture_flops
from benchmark_process import ENGINES, guarded, in_turn, keep, machine, paired_ratio, peak_mib, run, show

from latentgen.checkpoint import find, open_folder
from latentgen.diffusion.schedule import from_config
from latentgen.errors import InputError

PROMPTS = ("a red apple", "a blue bird", "a smiling face", "a green car")
SHORTEST = """
import sys
import torch
from diffusers import StableDiffusionPipeline
folder, prompt, steps, guidance, out = sys.argv[1:]
gpu = torch.cuda.is_available()
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16 if gpu else torch.float32)
pipe.to("cuda" if gpu else "cpu")
call = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
pipe(prompt, **call, generator=torch.Generator().manual_seed(0)).images[0].save(out)
"""
STARTS = {"import": ("-c", "import latentgen"), "--help": ("-m", "latentgen.cli", "--help")}  # what Python is told
STARTED = 3  # times in each round
HALF = ("bfloat16", "float16")
Render = Callable[[list[str], np.ndarray, int, float], np.ndarray]  # prompts, latents, steps, guidance -> (B, H, W, 3)


def sampler_of(folder: Path) -> str:
    """The name here of the folder's own scheduler."""
    return from_config(open_folder(folder, verify=False).config("scheduler")).sampler


def ours(folder: Path, engine: str = "auto", *, compiled: bool = False, dtype: str | None = None) -> Render:
    """latentgen's Pipeline, which computes in float32 on a CPU and in float16 on a GPU where nothing is said."""
    from latentgen.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(folder, engine=engine, compile=compiled, dtype=dtype)
    sampler = sampler_of(folder)

    def render(prompts: list[str], latents: np.ndarray, steps: int, guidance: float) -> np.ndarray:
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
        call |= {"guidance_interval": (0.0, 1.0)}  # as diffusers', whatever the weights' own default
        return np.asarray(pipe(prompts, latents=latents, seed=0, output_type="np", **call).images)

    return render


def theirs(folder: Path, *, compiled: bool = False, dtype: str | None = None) -> Render:
    """diffusers' StableDiffusionPipeline as it comes, in the same types; compiled: its U-Net too."""
    import torch
    from diffusers import StableDiffusionPipeline

    gpu = torch.cuda.is_available()
    kind = getattr(torch, dtype or ("float16" if gpu else "float32"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=kind).to("cuda" if gpu else "cpu")
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead" if gpu else "default")

    def render(prompts: list[str], latents: np.ndarray, steps: int, guidance: float) -> np.ndarray:
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
        start = torch.from_numpy(latents).to(pipe.device, kind)
        return np.asarray(pipe(prompts, latents=start, output_type="np", **call).images)

    return render


WORKERS: dict[str, Callable[[Path], Render]] = {
    "latentgen": ours,
    "diffusers": theirs,
    "torch": partial(ours, engine="torch"),
    "torch-compiled": partial(ours, engine="torch", compiled=True),
    "diffusers-compiled": partial(theirs, compiled=True),
    **{f"latentgen-{name}": partial(ours, dtype=name) for name in HALF},
    **{f"diffusers-{name}": partial(theirs, dtype=name) for name in HALF},
}


def work(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One worker: load, render once, then `repeats` times against the clock; the pictures are left in the scratch."""
    render = WORKERS[asked.worker](folder)
    config = open_folder(folder, verify=False).config("unet")
    side = config["sample_size"]
    sides = (side, side) if isinstance(side, int) else tuple(side)
    latents = np.random.default_rng(0).standard_normal((asked.batch, config["in_channels"], *sides), np.float32)
    prompts = [PROMPTS[k % len(PROMPTS)] for k in range(asked.batch)]
    start = time.perf_counter()
    pictures = render(prompts, latents, asked.steps, asked.guidance)
    first = time.perf_counter() - start
    seconds = []
    for _ in range(asked.repeats):
        start = time.perf_counter()
        pictures = render(prompts, latents, asked.steps, asked.guidance)
        seconds.append((time.perf_counter() - start) / asked.batch)
    peak = peak_mib()
    np.save(asked.scratch / f"{asked.worker}.npy", pictures)
    warm = {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "least": min(seconds),
        "first": first,
        "peak_mib": peak,
    }
    flops = picture_flops(folder, guided=True)
    share = (asked.steps * flops["step"] + flops["decoding"]) / warm["median"] / (peak_flops := matrix_peak())
    return {**warm, "flops": flops, "peak_gflops": peak_flops / 1e9, "share": share, "machine": machine()}


def shell_seconds(asked: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds from starting a process to one PNG on the disk, by engine."""
    steps, guidance, sampler = str(asked.steps), str(asked.guidance), sampler_of(folder)
    out = {engine: str(asked.scratch / f"{engine}.png") for engine in ENGINES}
    options = ["--steps", steps, "--guidance", guidance, "--guidance-interval", "0", "1", "--sampler", sampler]
    options += ["--seed", "0", "--weights", str(folder)]
    mine = [sys.executable, "-m", "latentgen.cli", "render", PROMPTS[0], *options, "--out", out["latentgen"]]
    other = [sys.executable, "-c", SHORTEST, str(folder), PROMPTS[0], steps, guidance, out["diffusers"]]
    seconds = {}
    for engine, command in zip(ENGINES, (mine, other), strict=True):
        start = time.perf_counter()
        run(command)
        seconds[engine] = time.perf_counter() - start
    return seconds


def start_seconds(runs: int) -> dict[str, float]:
    """Seconds that each of `STARTS` takes beyond a bare Python's start: the median over `runs`, in turn."""
    commands = {"bare": ("-c", "pass"), **STARTS}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            run([sys.executable, *command])
            if turn:  # the first reads the files from the disk
                taken[name].append(time.perf_counter() - start)
    beyond = {name: zip(taken[name], taken["bare"], strict=True) for name in STARTS}
    return {name: statistics.median(whole - bare for whole, bare in pairs) for name, pairs in beyond.items()}


def measure(asked: argparse.Namespace, folder: Path, given: Sequence[str]) -> None:
    """Both engines in turn, then both from the shell in turn; a table and JSON."""
    pairs = in_turn(__file__, [*given, "--weights", str(folder), "--scratch", str(asked.scratch)], asked.rounds)
    shells = [shell_seconds(asked, folder) for _ in range(asked.rounds)]
    pictures = [np.load(asked.scratch / f"{engine}.npy") for engine in ENGINES]
    started = start_seconds(STARTED * asked.rounds)
    shell = {engine: statistics.median(turn[engine] for turn in shells) for engine in ENGINES}
    warm = {engine: [second for pair in pairs for second in pair[engine]["seconds"]] for engine in ENGINES}
    result: dict[str, Any] = {
        "steps": asked.steps,
        "batch": asked.batch,
        "guidance_scale": asked.guidance,
        "rounds": asked.rounds,
        "sampler": sampler_of(folder),
        "size": list(pictures[0].shape[1:3]),
        "machine": pairs[0]["latentgen"]["machine"],
        "seconds_least": {engine: min(warm[engine]) for engine in ENGINES},
        "seconds_median": {engine: statistics.median(warm[engine]) for engine in ENGINES},
        "ratio": paired_ratio(pairs, "median", "diffusers", "latentgen"),
        "shell_seconds": shell,
        "start_seconds": {name: {"latentgen": seconds} for name, seconds in started.items()},
        "shell_ratio": statistics.median(turn["diffusers"] / turn["latentgen"] for turn in shells),
        "peak_mib": {engine: max(pair[engine]["peak_mib"] for pair in pairs) for engine in ENGINES},
        "share_of_peak": {e: statistics.median(pair[e]["share"] for pair in pairs) for e in ENGINES},
        "peak_gflops": {e: statistics.median(pair[e]["peak_gflops"] for pair in pairs) for e in ENGINES},
        "largest_difference": float(np.abs(pictures[0] - pictures[1]).max()),
        "pairs": pairs,
        "shells": shells,
    }
    names = {
        "seconds_least": "seconds a warm picture, least",
        "seconds_median": "seconds a warm picture, median",
        "shell_seconds": "seconds from shell to picture",
        "peak_mib": "peak memory, MiB",
        "peak_gflops": "a large matrix product, GFLOP/s",
        "share_of_peak": "share of that in a warm picture",
    }
    rows = {said: result[key] for key, said in names.items()}
    rows |= {f"seconds of {name} beyond a bare Python": figure for name, figure in result["start_seconds"].items()}
    ratio = (
        f"ratio diffusers/latentgen {result['ratio']:.3f} warm, {result['shell_ratio']:.3f} from the shell; largest "
        f"difference of a pixel in [0, 1] {result['largest_difference']:.2g}"
    )
    title = f"{asked.steps} steps of {result['sampler']}, batch {asked.batch}"
    show(title, rows, ratio, result, asked.json)


def gain_of_compiling(asked: argparse.Namespace, folder: Path, given: Sequence[str]) -> None:
    """The torch engine and diffusers, each with its U-Net compiled and not, in turn; a table and JSON."""
    engines = ("torch", "torch-compiled", "diffusers", "diffusers-compiled")
    pairs = in_turn(
        __file__, [*given, "--weights", str(folder), "--scratch", str(asked.scratch)], asked.rounds, engines
    )
    warm = {engine: [second for pair in pairs for second in pair[engine]["seconds"]] for engine in engines}
    rows = {
        "seconds a warm picture, least": {engine: min(warm[engine]) for engine in engines},
        "seconds a warm picture, median": {engine: statistics.median(warm[engine]) for engine in engines},
        "seconds of the first picture, most": {e: max(pair[e]["first"] for pair in pairs) for e in engines},
        "peak memory, MiB": {engine: max(pair[engine]["peak_mib"] for pair in pairs) for engine in engines},
    }
    ratios = {
        "compiling gains": paired_ratio(pairs, "median", "torch", "torch-compiled"),
        "diffusers' gains": paired_ratio(pairs, "median", "diffusers", "diffusers-compiled"),
        "compiled diffusers/compiled latentgen": paired_ratio(pairs, "median", "diffusers-compiled", "torch-compiled"),
        "diffusers/latentgen's torch engine": paired_ratio(pairs, "median", "diffusers", "torch"),
    }
    pictures = [np.load(asked.scratch / f"{engine}.npy") for engine in engines]
    apart = max(float(np.abs(picture - pictures[0]).max()) for picture in pictures)
    said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    result = {"machine": pairs[0]["torch"]["machine"], "rows": rows, "ratios": ratios, "largest_difference": apart}
    title = f"{asked.steps} steps of {sampler_of(folder)}, batch {asked.batch}"
    said = f"ratios: {said}; largest difference of a pixel in [0, 1] {apart:.2g}"
    show(title, rows, said, {**result, "pairs": pairs}, asked.json, engines)


def price_of_type(asked: argparse.Namespace, folder: Path, given: Sequence[str]) -> None:
    """Both engines in the type they take by themselves and in `--dtype`, in turn: time, memory and PSNR; and JSON."""
    names = ("latentgen", f"latentgen-{asked.dtype}", "diffusers", f"diffusers-{asked.dtype}")
    scratch = ["--weights", str(folder), "--scratch", str(asked.scratch)]
    pairs = in_turn(__file__, [*given, *scratch], asked.rounds, names)
    pictures = {name: np.load(asked.scratch / f"{name}.npy") for name in names}
    errors = {name: np.mean((pictures[name] - pictures["latentgen"]) ** 2, axis=(1, 2, 3)) for name in names[1:]}
    psnr = {name: -10 * np.log10(np.maximum(each, 1e-12)) for name, each in errors.items()}
    warm = {name: [second for pair in pairs for second in pair[name]["seconds"]] for name in names}
    rows: dict[str, dict[str, float]] = {
        "seconds a warm picture, least": {name: min(warm[name]) for name in names},
        "seconds a warm picture, median": {name: statistics.median(warm[name]) for name in names},
        "peak memory, MiB": {name: max(pair[name]["peak_mib"] for pair in pairs) for name in names},
        "PSNR to the first, dB, mean": {name: float(each.mean()) for name, each in psnr.items()},
        "PSNR to the first, dB, worst": {name: float(each.min()) for name, each in psnr.items()},
    }
    half, other = names[1], names[3]
    ratios = {
        f"{asked.dtype} gains": paired_ratio(pairs, "median", "latentgen", half),
        f"diffusers/{half}": paired_ratio(pairs, "median", "diffusers", half),
        f"{other}/{half}": paired_ratio(pairs, "median", other, half),
    }
    said = "ratios: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    title = f"{asked.steps} steps of {sampler_of(folder)}, {asked.batch} at a time"
    result = {"machine": pairs[0]["diffusers"]["machine"], "rows": rows, "ratios": ratios, "pairs": pairs}
    show(title, rows, said, result, asked.json, names)


def price_of_cache(asked: argparse.Namespace, folder: Path) -> None:
    """The torch engine with its deep features kept over `--feature-cache` steps, and without: gain, PSNR and JSON."""
    from latentgen.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(folder, engine="torch")
    prompts = [PROMPTS[k % len(PROMPTS)] for k in range(asked.batch)]
    call: dict[str, Any] = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance, "output_type": "np"}
    call |= {"guidance_interval": (0.0, 1.0)}
    seconds: dict[int, list[float]] = {1: [], asked.feature_cache: []}
    errors = []
    for turn in range(asked.rounds + 1):
        pictures = {}
        for every, taken in seconds.items():
            for _ in range(asked.repeats if turn else 1):
                start = time.perf_counter()
                pictures[every] = pipe(prompts, seed=turn * asked.batch, feature_cache=every, **call).images
                if turn:  # the first is to warm up
                    taken.append(time.perf_counter() - start)
        errors += [float(np.mean((a - b) ** 2)) for a, b in zip(*pictures.values(), strict=True)]
    ratio = statistics.median(whole / kept for whole, kept in zip(*seconds.values(), strict=True))
    psnr = [-10 * float(np.log10(max(error, 1e-12))) for error in errors]
    result = {
        "steps": asked.steps,
        "batch": asked.batch,
        "guidance_scale": asked.guidance,
        "feature_cache": asked.feature_cache,
        "machine": machine(),
        "seconds": {"without": seconds[1], "with": seconds[asked.feature_cache]},
        "ratio": ratio,
        "psnr": psnr,
    }
    print(
        f"feature cache, deep layers every {asked.feature_cache} of {asked.steps} steps: {ratio:.2f} times as fast; "
        f"PSNR to the pictures without it {np.mean(psnr):.1f} dB on average, {min(psnr):.1f} dB at worst "
        f"({len(psnr)} pictures)"
    )
    keep(result, asked.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a weights folder; default: the embedded one")
    parser.add_argument("--form", choices=NAMES, default="icons", help="random weights of this form instead")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=4.0, help="above 1, which would be off")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls in each process")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--feature-cache", type=int, metavar="N", help="instead: the torch engine with it and without")
    parser.add_argument("--dtype", choices=HALF, help="instead: both engines in this type and in their own")
    parser.add_argument(
        "--compile", action="store_true", help="instead: the torch engine and diffusers, compiled or not"
    )
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if min(asked.steps, asked.batch, asked.rounds, asked.repeats) < 1 or asked.guidance <= 1:
        raise InputError("--steps, --batch, --rounds and --repeats must be 1 or more, and --guidance above 1")
    if asked.worker:
        print(json.dumps(work(asked, find(asked.weights).resolve())))
        return
    if asked.feature_cache is not None and asked.feature_cache < 2:
        raise InputError("--feature-cache must be 2 or more; 1 is off")
    instead = [name for name in ("feature_cache", "dtype", "compile") if getattr(asked, name)]
    if len(instead) > 1:
        said = " and ".join(f"--{name.replace('_', '-')}" for name in instead)
        raise InputError(f"{said} are not measured together; give one of them")
    with tempfile.TemporaryDirectory() as scratch:
        asked.scratch = Path(scratch)
        folder = find(form_folder(asked.form, asked.weights, asked.scratch, graphs=True)).resolve()
        if asked.feature_cache is not None:
            price_of_cache(asked, folder)
        elif asked.dtype is not None:
            price_of_type(asked, folder, sys.argv[1:])
        elif asked.compile:
            gain_of_compiling(asked, folder, sys.argv[1:])
        else:
            measure(asked, folder, sys.argv[1:])


if __name__ == "__main__":
    guarded(main)
