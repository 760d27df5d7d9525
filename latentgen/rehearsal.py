"""`latentgen train --dry-run`: every check and the first steps of every stage, measured; nothing is trained or kept."""

from __future__ import annotations

import difflib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.flop_counter import FlopCounterMode

from latentgen.build import Run
from latentgen.continuation import Continuation, open_start, refuse_itself
from latentgen.errors import InputError
from latentgen.pixels.build import PixelRun
from latentgen.pixels.objective import PixelObjective
from latentgen.pixels.recipe import read_pixel_recipe
from latentgen.recipe import Train, read_kind, read_recipe
from latentgen.stopping import half_done
from latentgen.training.cache import Items
from latentgen.training.contention import Contention
from latentgen.training.draw import Draw
from latentgen.training.finish import check_places
from latentgen.training.loop import LoopSettings, NotFinite, TrainState, fit, order_of, recompute_where_asked
from latentgen.training.memory import saying_what_saves
from latentgen.training.sharding import any_of
from latentgen.training.stage import Report, duration

WARM, SECONDS, MOST = 2, 6.0, 20  # steps before the clock starts; how long, and how many steps, it runs at most
WATCHED = 2.0  # seconds that tell whether other programs take the cores


@dataclass(frozen=True)
class Measured:
    """One stage as its first steps were. gflop: of a sample's forward and backward pass; memory: peak, MiB.

    alone: whether that peak is this stage's own, and not the highest of all up to it. disk: MiB of its two checkpoints,
    its best weights and its kept averages. contended: what is said where other programs slow it down.
    """

    name: str
    weights: int
    gflop: float
    samples_per_second: float
    seconds: float
    memory: float
    alone: bool
    checkpoint: float  # MiB on the disk
    disk: float
    contended: str | None = None

    def line(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.name}: {self.weights / 1e6:.1f}M weights, {self.gflop:.2f} GFLOP a sample, "
            f"{self.samples_per_second:.1f} samples/s ({self.gflop * self.samples_per_second:.0f} GFLOP/s), "
            f"{duration(self.seconds)} in all, {self.memory:.0f} MiB of memory{'' if self.alone else ' so far'}, "
            f"{self.checkpoint:.0f} MiB a checkpoint{f'; {self.contended}' if self.contended else ''}"
        )


def rehearse(
    recipe: Path,
    out: Path | None,
    data: Path | None,
    report: Report,
    start: Path | None = None,
    only: str | None = None,
) -> list[Measured]:
    """Check a recipe, its data and its place, and say what each stage will take, from a few measured steps.

    What a stage would learn from is made up where an earlier stage would have to be trained for it: speed and memory
    do not depend on it. Each stage is also judged once and draws its sheet, and its gate is held to name figures that
    there are. start, only: the weights folder that a run would go on from, and what it would train
    of it. Nothing is written but to a temporary folder. Raises InputError as `build.train` would.
    """
    run: Rehearsal | PixelRehearsal
    if read_kind(recipe) == "pixels":
        pixels = read_pixel_recipe(recipe)
        name, more = pixels.name, "what the likelihoods take"
        final = out or Path("weights") / name
        run = PixelRehearsal(pixels, final, data or pixels.data.folder, report)
    else:
        what = read_recipe(recipe)
        name, more = what.name, "what preparing takes"
        final = out or Path("weights") / name
        if start is not None:
            refuse_itself(start, final)
        given = (what, final, data or what.data.folder, report)
        run = Rehearsal(*given) if start is None else RehearsedContinuation(*given, open_start(what, start), only)
    check_places(final, run.folder, run.recipe.data.captions)
    with _scratch(run.accelerator) as run.state:
        run.all()
        caches = run.caches + _size_mib(run.state / "cache")
    final = final.absolute()
    run.report(f"{name}: {duration(sum(stage.seconds for stage in run.measured))} in all, and {more}")
    needed = caches + disk_of(run.measured)
    free = shutil.disk_usage(_existing(final)).free / 2**20
    short = f"; ONLY {free:.0f} MiB are free there" if free < needed else ""
    run.report(f"{name}: would write {final} and, beside it, about {needed:.0f} MiB of checkpoints and caches{short}")
    return run.measured


@contextmanager
def _scratch(accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder that all processes share; the first removes it when all are done."""
    first = accelerator.is_main_process
    with half_done(), tempfile.TemporaryDirectory(prefix="latentgen-") if first else nullcontext("") as made:
        (place,) = broadcast_object_list([made])
        yield Path(place)
        accelerator.wait_for_everyone()


def disk_of(stages: Sequence[Measured]) -> float:
    """MiB that the stages leave on the disk, and of the largest a checkpoint more: it is written before one goes."""
    return sum(stage.disk for stage in stages) + max(stage.checkpoint for stage in stages)


class Rehearsal(Run):
    """A run whose stages take a few steps each, and whose caches hold made-up numbers."""

    keeps = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.measured: list[Measured] = []
        self.caches = 0.0  # MiB, of what is made up

    def all(self) -> Path:
        """Every stage in turn."""
        where, count = self.accelerator.device, self.accelerator.num_processes
        self.report(f"{self.recipe.name}: a rehearsal on {where}, {count} process(es)")
        _ = self.finished_vae
        return self.out

    def _run(
        self, name: str, objective: Any, what: Train, gate: Mapping[str, float], place: Path
    ) -> Mapping[str, float]:
        measured = measure(name, objective, what, gate, self.accelerator)
        self.measured.append(measured)
        self.report(measured.line())
        self.figures[name] = {}
        return {}

    def _normalised(self, vae: Any, place: Path) -> Mapping[str, float]:
        return {}

    def _cached(self, items: Items) -> np.ndarray:
        shape, kind = (len(items.keys), *items.shape), items.dtype
        size = float(np.prod(shape)) * np.dtype(kind).itemsize
        self.caches += size / 2**20
        rows = min(shape[0], 256)  # as many different ones as tell; the same again and again for the rest
        few: np.ndarray = np.random.default_rng(0).standard_normal((rows, *shape[1:]), dtype=np.float32).astype(kind)
        return few[np.arange(shape[0]) % rows] if size < 2**30 else np.broadcast_to(few[:1], shape)


class RehearsedContinuation(Rehearsal, Continuation):
    """The same for a run that goes on from a finished folder."""


class PixelRehearsal(PixelRun):
    """The same for a pixel recipe; its likelihoods are not taken."""

    caches = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.measured: list[Measured] = []

    def all(self) -> Path:
        """Its one stage."""
        where, count = self.accelerator.device, self.accelerator.num_processes
        self.report(f"{self.recipe.name}: a rehearsal on {where}, {count} process(es)")
        self.report(f"data: {self.ledger.line()}")
        self.trained()
        return self.out

    def _run(self, objective: PixelObjective) -> Mapping[str, float]:
        measured = measure("pixels", objective, self.recipe.train, self.recipe.gate, self.accelerator)
        self.measured.append(measured)
        self.report(measured.line())
        return {}


def measure(name: str, objective: Any, what: Train, gate: Mapping[str, float], accelerator: Accelerator) -> Measured:
    """A stage's first steps by the clock, then one look at it: figures that its gate may name, and a sheet."""
    settings = LoopSettings(**what.model_dump())
    recompute_where_asked(name, objective.module, settings)
    alone = _restart_peak()
    state = TrainState.start(objective.module, settings)
    with saying_what_saves(name, objective, settings, accelerator):
        gflop = gflop_of(objective, settings, accelerator)
        contention = Contention.on(accelerator.device, WATCHED)
        try:
            rate = samples_per_second(objective, state, settings, accelerator)
        except NotFinite as broken:
            raise InputError(f"{name}: {broken}; lower the rate") from None
    contended = contention.line()
    check_gate(name, gate, {**objective.validate(), "steps": 0.0, "skipped": 0.0})
    objective.sheet()
    stored = sum(value.numel() * value.element_size() for part in state.tensors().values() for value in part.values())
    averaged = sum(value.numel() for value in state.average.values())
    halves = len(settings.averages) * (settings.kept_averages + 1)  # power-function averages, 2 bytes a weight
    return Measured(
        name=name,
        weights=sum(weight.numel() for weight in objective.module.parameters()),
        gflop=gflop,
        samples_per_second=rate,
        seconds=settings.steps * settings.batch / rate,
        memory=_peak_mib(),
        alone=alone,
        checkpoint=stored / 2**20,
        disk=(2 * stored + (4 + 2 * halves) * averaged) / 2**20,
        contended=contended,
    )


def samples_per_second(objective: Any, state: TrainState, settings: LoopSettings, accelerator: Accelerator) -> float:
    """Of all processes together, in some steps that are taken. Raises NotFinite as `fit` does."""
    steps, began = 0, time.monotonic()
    for progress in fit(objective, state, replace(settings, steps=WARM + MOST), accelerator, seed=0):
        if progress.step == WARM:
            began = time.monotonic()
        steps = progress.step - WARM
        (enough,) = any_of((steps > 0 and time.monotonic() - began > SECONDS,), accelerator)  # all leave at one step
        if enough:
            break
    return settings.batch * steps / (time.monotonic() - began)


def check_gate(name: str, gate: Mapping[str, float], figures: Mapping[str, float]) -> None:
    """Raises InputError where a gate names a figure that a stage has not: before the hours, not after them."""
    for key in gate:
        figure = key.removeprefix("max_")
        if figure not in figures:
            near = difflib.get_close_matches(figure, figures, n=1, cutoff=0.5)
            right = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(figures)}"
            raise InputError(f"the gate of {name} names {key!r}, which is none of its figures; {right}")


def gflop_of(objective: Any, settings: LoopSettings, accelerator: Accelerator) -> float:
    """Of one sample, forward and backward, as counted; what is frozen has no backward pass.

    The fused attention kernel of a CPU is not counted by torch; its share of a U-Net's step is small.
    """
    count = min(settings.batch, 8)
    items = order_of(objective, count, 0).items(0)
    objective.module.train()  # as it is taught: what blocks compute is computed again there alone
    with FlopCounterMode(display=False) as counter:
        with accelerator.autocast():
            loss = objective.loss(items, Draw(0, 0, count))["loss"]
        loss.backward()
    objective.module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / count / 1e9


def _restart_peak() -> bool:
    """Count the peak of memory from now on; whether that is possible here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes what is held now
    except OSError:
        return False
    return _linux_peak_mib() is not None


def _peak_mib() -> float:
    """Peak memory of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return _linux_peak_mib() or peak


def _linux_peak_mib() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), None)


def _size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
