"""`latentgen train --dry-run`: every check and the first steps of every stage, measured; nothing is trained or kept."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from latentgen.build import Run
from latentgen.recipe import Recipe, Train, read_recipe
from latentgen.training.cache import Items
from latentgen.training.draw import Draw
from latentgen.training.loop import LoopSettings, TrainState, fit, order_of
from latentgen.training.stage import Report, duration

WARM, SECONDS, MOST = 2, 6.0, 20  # steps before the clock starts; how long, and how many steps, it runs at most


@dataclass(frozen=True)
class Measured:
    """One stage as its first steps were. gflop: of a sample's forward and backward pass; memory: peak, MiB."""

    name: str
    weights: int
    gflop: float
    samples_per_second: float
    seconds: float
    memory: float
    checkpoint: float  # MiB on the disk

    def line(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.name}: {self.weights / 1e6:.1f}M weights, {self.gflop:.2f} GFLOP a sample, "
            f"{self.samples_per_second:.1f} samples/s ({self.gflop * self.samples_per_second:.0f} GFLOP/s), "
            f"{duration(self.seconds)} in all, {self.memory:.0f} MiB of memory, {self.checkpoint:.0f} MiB a checkpoint"
        )


def rehearse(recipe: Path, out: Path | None, data: Path | None, report: Report) -> list[Measured]:
    """Check a recipe, its data and its place, and say what each stage will take, from a few measured steps.

    What a stage would learn from is made up where an earlier stage would have to be trained for it: speed and memory
    do not depend on it. Nothing is written but to a temporary folder. Raises InputError as `build.train` would.
    """
    what = read_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="latentgen-") as scratch:
        place = Path(scratch) / what.name
        run = Rehearsal(what, place, data or what.data.folder, report)
        run.all()
    final = (out or Path("weights") / what.name).absolute()
    run.report(
        f"{what.name}: {duration(sum(stage.seconds for stage in run.measured))} in all, and what preparing takes"
    )
    needed = run.disk()
    free = shutil.disk_usage(_existing(final)).free / 2**20
    short = f"; ONLY {free:.0f} MiB are free there" if free < needed else ""
    run.report(
        f"{what.name}: would write {final} and, beside it, about {needed:.0f} MiB of checkpoints and caches{short}"
    )
    return run.measured


class Rehearsal(Run):
    """A run whose stages take a few steps each, and whose caches hold made-up numbers."""

    keeps = False

    def __init__(self, recipe: Recipe, out: Path, folder: Path, say: Report) -> None:
        super().__init__(recipe, out, folder, say)
        self.measured: list[Measured] = []
        self._caches = 0.0

    def all(self) -> Path:
        """Every stage in turn."""
        where, count = self.accelerator.device, self.accelerator.num_processes
        self.report(f"{self.recipe.name}: a rehearsal on {where}, {count} process(es)")
        _ = self.finished_vae
        return self.out

    def disk(self) -> float:
        """MiB of two checkpoints a stage, the best weights, and the caches."""
        return sum(2.4 * stage.checkpoint for stage in self.measured) + self._caches

    def _run(
        self, name: str, objective: Any, what: Train, gate: Mapping[str, float], place: Path
    ) -> Mapping[str, float]:
        settings = LoopSettings(**what.model_dump())
        state = TrainState.start(objective.module, settings)
        gflop = gflop_of(objective, settings, self.accelerator)
        steps, began = 0, time.monotonic()
        for progress in fit(objective, state, replace(settings, steps=WARM + MOST), self.accelerator, seed=0):
            if progress.step == WARM:
                began = time.monotonic()
            steps = progress.step - WARM
            if steps > 0 and time.monotonic() - began > SECONDS:
                break
        rate = settings.batch * steps / (time.monotonic() - began)
        stored = sum(
            value.numel() * value.element_size() for part in state.tensors().values() for value in part.values()
        )
        measured = Measured(
            name=name,
            weights=sum(weight.numel() for weight in objective.module.parameters()),
            gflop=gflop,
            samples_per_second=rate,
            seconds=settings.steps * settings.batch / rate,
            memory=_peak_mib(),
            checkpoint=stored / 2**20,
        )
        self.measured.append(measured)
        self.report(measured.line())
        self.figures[name] = {}
        return {}

    def _normalised(self, vae: Any) -> Mapping[str, float]:
        return {}

    def _cached(self, items: Items) -> np.ndarray:
        shape, kind = (len(items.keys), *items.shape), items.dtype
        size = float(np.prod(shape)) * np.dtype(kind).itemsize
        self._caches += size / 2**20
        rows = min(shape[0], 256)  # as many different ones as tell; the same again and again for the rest
        few: np.ndarray = np.random.default_rng(0).standard_normal((rows, *shape[1:]), dtype=np.float32).astype(kind)
        return few[np.arange(shape[0]) % rows] if size < 2**30 else np.broadcast_to(few[:1], shape)


def gflop_of(objective: Any, settings: LoopSettings, accelerator: Accelerator) -> float:
    """Of one sample, forward and backward, as counted; what is frozen has no backward pass.

    The fused attention kernel of a CPU is not counted by torch; its share of a U-Net's step is small.
    """
    count = min(settings.batch, 8)
    items = order_of(objective, count, 0).items(0)
    with FlopCounterMode(display=False) as counter:
        with accelerator.autocast():
            loss = objective.loss(items, Draw(0, 0, count))["loss"]
        loss.backward()
    objective.module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / count / 1e9


def _peak_mib() -> float:
    """Peak memory of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
