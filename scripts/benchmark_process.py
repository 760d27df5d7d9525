"""Two engines measured in turn, each in a fresh process of its own, so that neither warms, fills or slows the other.

A worker is the same script started with `--worker ENGINE`; the last line of its standard output is JSON. What starts
the workers imports no torch: Linux counts the memory of the process that starts another into that one's ru_maxrss.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentgen.durable import write_file
from latentgen.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("latentgen", "diffusers")
Found = Mapping[str, Any]  # what one worker measured
Pair = Mapping[str, Found]  # by engine


def run(command: Sequence[str]) -> str:
    """Standard output of a process that imports this very latentgen and stays off the network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    there = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=there, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(said[-1].removeprefix("latentgen: "))
    return done.stdout


def in_turn(script: str, arguments: Sequence[str], rounds: int, engines: tuple[str, ...] = ENGINES) -> list[Pair]:
    """Run `script` as a worker of each engine, `rounds` times; who goes first changes from round to round."""
    pairs = []
    for turn in range(rounds):
        order = engines if turn % 2 == 0 else engines[::-1]
        commands = {engine: [sys.executable, script, *arguments, "--worker", engine] for engine in order}
        pairs.append({engine: json.loads(run(command).splitlines()[-1]) for engine, command in commands.items()})
    return pairs


def paired_ratio(pairs: Sequence[Pair], figure: str, over: str, under: str) -> float:
    """Median over the rounds of one engine's figure divided by the other's in the same round."""
    return statistics.median(pair[over][figure] / pair[under][figure] for pair in pairs)


def peak_mib() -> float:
    """The most memory this process has held resident, MiB (ru_maxrss counts KiB, on macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """What a measurement means nothing without; asked for by a worker, as it imports torch."""
    import diffusers
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
    }


def show(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    ratio: str,
    result: Mapping[str, Any],
    path: Path | None,
    engines: tuple[str, ...] = ENGINES,
) -> None:
    """A table of both engines, the ratio under it; the whole result, its "machine" included, as JSON in `path`.

    A figure may be of one engine alone.
    """
    from rich.console import Console
    from rich.table import Table

    where = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    table = Table("", *engines, title=f"{title}\n{where}", caption=ratio)
    for name, figures in rows.items():
        table.add_row(name, *(f"{figures[engine]:.4g}" if engine in figures else "" for engine in engines))
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    keep(result, path)


def keep(result: Mapping[str, Any], path: Path | None) -> None:
    """The whole result as JSON in `path`, where one is given."""
    if path is not None:
        write_file(path, (json.dumps(result, indent=2) + "\n").encode())


def guarded(main: Callable[[], None]) -> None:
    """Run a script's main; what cannot be used is said in one line, exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"latentgen: {error}", file=sys.stderr)
        sys.exit(2)
