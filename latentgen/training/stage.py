"""One stage of a training run: goes on where it stopped, logs, samples, saves, and holds its gate at the end.

A stage lives in a folder named for what it depends on, so that a stage that is done is not done again unless one of
those things has changed, and nothing is lost when it changes back.
"""

import hashlib
import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latentgen.durable import saying_what_failed, write_file
from latentgen.errors import InputError
from latentgen.training import averages
from latentgen.training.board import Board
from latentgen.training.contention import Contention
from latentgen.training.log import Log, figures_of
from latentgen.training.loop import (
    LoopSettings,
    NotFinite,
    Objective,
    Progress,
    TrainState,
    fit,
    recompute_where_asked,
)
from latentgen.training.memory import saying_what_saves, table_of
from latentgen.training.sharding import any_of, is_sharded, whole
from latentgen.training.snapshots import Snapshots

Report = Callable[[str], None]  # one line for people
# Of LoopSettings: what may change in the middle of a run, which then goes on from where it is.
FREE = ("steps", "accumulate", "activation_checkpointing", "kept_averages")
RETREATS = 3  # how often a run goes back to its last good checkpoint before it gives up
ECHO = 1.0  # seconds
SLOWER = 0.5  # what the rate is multiplied by each time


@dataclass(frozen=True)
class Pace:
    """When a stage looks up from its work: seconds between log lines and checkpoints, steps between validations.

    patience: validations without a better figure after which it stops; 0 never stops.
    """

    log_seconds: float = 10.0
    save_seconds: float = 300.0
    validate_steps: int = 500
    patience: int = 0


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits of what a stage depends on (anything JSON can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def settings_fingerprint(settings: LoopSettings) -> Mapping[str, Any]:
    """What of the loop's settings a stage depends on; of those added later, what is not at its default."""
    added = {f.name: f.default for f in fields(LoopSettings) if f.name in ("decay_shape", "optimizer", "averages")}
    told = asdict(settings)
    return {key: value for key, value in told.items() if key not in FREE and (key not in added or value != added[key])}


def run_stage(
    name: str,
    objective: Objective,
    settings: LoopSettings,
    folder: Path,
    accelerator: Accelerator,
    *,
    seed: int,
    gate: Mapping[str, float],
    pace: Pace,
    report: Report,
    held_out: str = "",
) -> Mapping[str, float]:
    """Train the objective to its end and leave the averaged weights in `objective.module`; returns its figures.

    `gate` names figures and the least each must reach (a name that starts with "max_" names the most). `held_out` names
    what the figures are of beside what the folder is named for: of others they are taken anew, without a step.
    Raises InputError where a gate does not hold; the checkpoints stay.
    """
    snapshots = Snapshots(folder / "checkpoints")
    recompute_where_asked(name, objective.module, settings)
    state = TrainState.start(objective.module, settings)
    for line in snapshots.restore(state):
        report(f"{name}: {line}")
    main = accelerator.is_main_process
    done = folder / "done.json"
    enough = state.step == settings.steps or _stalled(snapshots, state.step, pace)
    told: Mapping[str, Any] = json.loads(done.read_text()) if done.is_file() else {"figures": {}}
    kept: Mapping[str, float] = told["figures"]
    whole_run = enough and kept.get("steps") == state.step  # figures of fewer stay where a longer run missed its gate
    if whole_run and told.get("held_out", held_out) == held_out:
        state.swap_average()
        report(f"{name}: done before ({state.step} steps), {_line(kept)}")
        _hold(name, gate, kept, settings)
        return kept
    if state.step > settings.steps:
        raise InputError(f"{name} has already trained {state.step} steps; give steps = {state.step} or more")
    if whole_run:
        report(f"{name}: done before ({state.step} steps) and judged by other pictures or captions; it is judged anew")
    else:
        report(f"{name}: {'goes on from' if state.step else 'starts at'} step {state.step} of {settings.steps}")
    if not enough:
        with saying_what_saves(name, objective, settings, accelerator):
            _train(name, objective, state, settings, folder, accelerator, snapshots, seed, pace, report)
    state.swap_average()
    figures = {**objective.validate(), "steps": float(state.step), "skipped": float(state.skipped)}
    report(f"{name}: {_line(figures)}")
    _hold(name, gate, figures, settings)
    if main:
        told = {"figures": figures, "held_out": held_out} if held_out else {"figures": figures}
        write_file(done, (json.dumps(told, indent=2) + "\n").encode())
    return figures


def _train(
    name: str,
    objective: Objective,
    state: TrainState,
    settings: LoopSettings,
    folder: Path,
    accelerator: Accelerator,
    snapshots: Snapshots,
    seed: int,
    pace: Pace,
    report: Report,
) -> None:
    main, sharded, several = accelerator.is_main_process, is_sharded(state.module), accelerator.num_processes > 1
    writes = main or sharded  # a state in parts is put together by all, and written by the main process
    clock = _Clock(state.step, settings)
    contention = Contention.on(accelerator.device)
    logged = saved = time.monotonic()
    every = max(1, settings.steps // settings.kept_averages)
    with _stop_asked() as stop, _board(folder, name, main) as board, Log(folder / "log.jsonl", main) as log:
        for progress in _lasting(name, objective, state, settings, accelerator, snapshots, seed, report):
            now = time.monotonic()
            log.step(progress)
            if main and (now - logged >= pace.log_seconds or progress.step == settings.steps):
                logged = now
                report(f"{name}: {clock.line(progress, state.skipped)}")
                if (line := contention.line()) is not None:
                    report(f"{name}: {line}")
                log.write()
                with saying_what_failed(folder.parent / "tensorboard"):
                    board.figures(progress.step, figures_of(progress))
            if progress.step % pace.validate_steps == 0 or progress.step == settings.steps:
                _look(name, objective, state, folder, snapshots, main, sharded, report, log, board)
            stalled = main and progress.step % pace.validate_steps == 0 and _stalled(snapshots, progress.step, pace)
            if writes and state.powers and (progress.step % every == 0 or progress.step == settings.steps):
                powers = {w: {name: whole(each) for name, each in of.items()} for w, of in state.powers.items()}
                if main:
                    averages.store(folder / "averages", progress.step, powers)
            due = main and now - saved >= pace.save_seconds and not progress.skipped  # never in the middle of trouble
            stopping = bool(stop)
            if several:  # all leave at one step: who went on alone would wait for the others in vain
                due, stopping, stalled = any_of((due, stopping, stalled), accelerator)
            if writes and (due or stalled or progress.step == settings.steps):
                log.write()
                snapshots.save(state, main)
                saved = time.monotonic()
            if stalled:
                best, steps = snapshots.best_step(), pace.patience * pace.validate_steps
                report(f"{name}: stops at step {progress.step}: no better since step {best}, {steps} steps or more")
                return
            if stopping:
                if writes and progress.skipped:  # as when it is due: the checkpoint before is the one to go back to
                    report(f"{name}: stopping among steps that are not finite; it goes on from the checkpoint before")
                    log.write()
                elif writes:
                    report(f"{name}: stopping; saving step {state.step}")
                    log.write()
                    snapshots.save(state, main)
                accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has left
                raise KeyboardInterrupt


def _lasting(
    name: str,
    objective: Objective,
    state: TrainState,
    settings: LoopSettings,
    accelerator: Accelerator,
    snapshots: Snapshots,
    seed: int,
    report: Report,
) -> Iterator[Progress]:
    """The loop; where it stays broken it goes on from the last good checkpoint with a lower rate, and says so."""
    while True:
        try:
            yield from fit(objective, state, settings, accelerator, seed=seed)
            return
        except NotFinite as broken:
            retreats, slowed, skipped = state.retreats + 1, state.slowed * SLOWER, state.skipped
            if retreats > RETREATS:
                raise InputError(f"{name}: {broken}, after {RETREATS} retreats; lower the rate") from broken
            accelerator.wait_for_everyone()
            if not any(snapshots.folder.glob("step-*")):
                raise InputError(
                    f"{name}: {broken}, and there is no checkpoint to go back to; lower the rate"
                ) from None
            for line in snapshots.restore(state):
                report(f"{name}: {line}")
            state.retreats, state.slowed, state.skipped = retreats, slowed, skipped
            report(f"{name}: {broken}; back to step {state.step}, the rate now {slowed:g} times what was asked")


def _stalled(snapshots: Snapshots, step: int, pace: Pace) -> bool:
    """Whether the best validation lies `pace.patience` validations back, or more."""
    best = snapshots.best_step() if pace.patience else None
    return best is not None and step - best >= pace.patience * pace.validate_steps


@contextmanager
def _stop_asked() -> Iterator[list[float]]:
    """A list that is filled when Ctrl-C or SIGTERM asks the run to stop: between two steps, where all is whole.

    A second Ctrl-C stops at once, but for what a launcher repeats within ECHO of the terminal's own. Outside the main
    thread signals are left alone.
    """
    asked: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _: object) -> None:
        if asked and time.monotonic() - asked[0] > ECHO:
            raise KeyboardInterrupt
        asked.append(time.monotonic())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look(
    name: str,
    objective: Objective,
    state: TrainState,
    folder: Path,
    snapshots: Snapshots,
    main: bool,
    sharded: bool,
    report: Report,
    log: Log,
    board: Board,
) -> None:
    """Validate and draw the sheet with the averaged weights; keep them if they are the best so far."""
    state.swap_average()
    try:
        figures = objective.validate()
        sheet = None
        if main or sharded:
            try:
                sheet = objective.sheet()
            except InputError as error:  # what cannot be drawn yet ends no run
                report(f"{name}: step {state.step}, no sheet: {error}")
    finally:
        state.swap_average()
    figure, sign = objective.judge
    if main or sharded:
        snapshots.save_best(state, figure, figures[figure], sign, main)
    if main:
        report(f"{name}: step {state.step}, held out: {_line(figures)}")
        log.figures(state.step, figures)
        log.write()
        with saying_what_failed(folder.parent / "tensorboard"):
            board.figures(state.step, figures)
        if sheet is not None:
            drawn = io.BytesIO()
            sheet.save(drawn, "PNG")
            write_file(folder / "sheets" / f"{name}-{state.step:07d}.png", drawn.getvalue())


@contextmanager
def _board(folder: Path, name: str, main: bool) -> Iterator[Board]:
    """`Board.beside`, whose logs raise InputError where they cannot be opened or ended."""
    with ExitStack() as held:
        with saying_what_failed(folder.parent / "tensorboard"):
            board = held.enter_context(Board.beside(folder, name, main))
        yield board
        with saying_what_failed(folder.parent / "tensorboard"):
            held.close()


class _Clock:
    """Rate and time left, from the steps of this session."""

    def __init__(self, start: int, settings: LoopSettings) -> None:
        self._start, self._settings, self._began = start, settings, time.monotonic()

    def line(self, progress: Progress, skipped: int) -> str:
        spent = time.monotonic() - self._began
        rate = (progress.step - self._start) / spent
        left = (self._settings.steps - progress.step) / rate
        losses = ", ".join(f"{name} {value:.4g}" for name, value in progress.losses.items())
        return (
            f"step {progress.step}/{self._settings.steps}, {losses}, {rate * self._settings.batch:.1f} samples/s, "
            f"{duration(left)} left{f', {skipped} skipped' if skipped else ''}"
        )


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _hold(name: str, gate: Mapping[str, float], figures: Mapping[str, float], settings: LoopSettings) -> None:
    for key, bound in gate.items():
        most = key.startswith("max_")
        figure = figures.get(key.removeprefix("max_"))
        if figure is None:
            raise InputError(f"the gate of {name} names {key!r}, which is none of its figures: {', '.join(figures)}")
        if not (figure <= bound if most else figure >= bound):
            side = "above" if most else "below"
            raise InputError(
                f"{name} does not pass its gate: {key.removeprefix('max_')} is {figure:.4g}, {side} {bound:.4g}, after "
                f"{settings.steps} steps; {table_of(name)}raise steps and run the same command, it goes on from there"
            )


def _line(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
