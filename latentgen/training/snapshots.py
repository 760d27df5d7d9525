"""Checkpoints of a training run: written aside, proved, renamed; a torn one is refused by name, the one before used."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen.checkpoint.tensors import save_tensors
from latentgen.durable import saying_what_failed, torn, write_folder
from latentgen.errors import InputError
from latentgen.training.loop import TrainState
from latentgen.training.sharding import put, whole

COUNTS = ("step", "skipped", "retreats", "slowed")  # what of a state is no tensor
BEST = "best"


class Snapshots:
    """The checkpoints of one stage in one folder: the newest `keep` of them, and the weights that did best."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._proved: set[Path] = set()  # once read and found whole; not read again at every save

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def save(self, state: TrainState, main: bool = True) -> None:
        """Write the state of this step; only when it is read back whole are the oldest removed.

        `keep` whole ones stay, this one among them; torn ones count for nothing, and go when those kept are newer.

        Of a state in parts every process gives its own, and the main one alone writes.
        Raises InputError where it cannot be written, or a weight is not finite: nothing is replaced by what is broken.
        """
        _refuse_what_is_not_finite(state)
        whole_state = state.tensors()
        if not main:
            return

        def write(folder: Path) -> None:
            for name, tensors in whole_state.items():
                save_tensors(_apart(tensors), folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps({key: getattr(state, key) for key in COUNTS}) + "\n")

        target = self.folder / f"step-{state.step:08d}"
        _write(target, write)
        self._proved.add(target)
        with saying_what_failed(self.folder):
            self._remove_old(target)

    def _remove_old(self, newest: Path) -> None:
        others = [folder for folder in reversed(self._all()) if folder != newest and self._is_whole(folder)]
        kept = [newest, *others[: self.keep - 1]]
        for folder in self._all() if len(kept) == self.keep else ():
            if folder.name < min(each.name for each in kept):
                shutil.rmtree(folder)

    def _is_whole(self, folder: Path) -> bool:
        if folder not in self._proved and torn(folder) is None:
            self._proved.add(folder)
        return folder in self._proved

    def save_best(self, state: TrainState, figure: str, value: float, sign: int, main: bool = True) -> bool:
        """Keep the averaged weights where they are better than the best so far; whether the main process did.

        A figure that is not finite is no better than any. Raises InputError where a weight is not finite.
        """
        _refuse_what_is_not_finite(state)
        average = {name: whole(each) for name, each in state.average.items()}
        if not main or not math.isfinite(value):
            return False
        place = self.folder / BEST
        if torn(place) is None:
            known = json.loads((place / "best.json").read_text())
            if known["figure"] == figure and known["value"] * sign >= value * sign:
                return False

        def write(folder: Path) -> None:
            save_tensors({key: each.contiguous() for key, each in average.items()}, folder / "average.safetensors")
            (folder / "best.json").write_text(json.dumps({"figure": figure, "value": value, "step": state.step}) + "\n")

        _write(place, write)
        return True

    def best_step(self) -> int | None:
        """The step of the weights that did best; None where none are kept, or they are torn."""
        place = self.folder / BEST
        return None if torn(place) is not None else int(json.loads((place / "best.json").read_text())["step"])

    def load_best(self, module: nn.Module) -> dict[str, Any] | None:
        """Put the weights that did best into the module; what is known of them (figure, value, step), or None."""
        place = self.folder / BEST
        if torn(place) is not None:
            return None
        named, kept = dict(module.named_parameters()), load_file(place / "average.safetensors")
        with torch.no_grad():
            for name, value in kept.items():
                put(named[name], value)
        return dict(json.loads((place / "best.json").read_text()))

    def restore(self, state: TrainState) -> list[str]:
        """Load the newest whole checkpoint into `state`, if there is one; returns a line for each that was refused."""
        refused = []
        for folder in reversed(self._all()):
            flaw = torn(folder)
            if flaw is None:
                self._proved.add(folder)
                files = {path.stem: path for path in folder.glob("*.safetensors")}
                kept = json.loads((folder / "state.json").read_text())
                state.load({name: load_file(path) for name, path in files.items()}, kept["step"])
                for key in COUNTS:
                    setattr(state, key, kept.get(key, getattr(state, key)))
                break
            refused.append(f"checkpoint {folder} is refused: {flaw}")
        return refused


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and a copy of what shares its memory with one before, which safetensors does not write."""
    told: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        told[name] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return told


def _write(target: Path, write: Callable[[Path], None]) -> None:
    """`write_folder`, read back before it takes the place of what was there; a torn one there is of no use."""
    with saying_what_failed(target):
        if target.is_dir() and torn(target) is not None:
            shutil.rmtree(target)
    write_folder(target, write, prove=True)


def _refuse_what_is_not_finite(state: TrainState) -> None:
    flaw = state.flaw()
    if flaw is not None:
        raise InputError(
            f"{flaw} is not finite at step {state.step}, which is not saved; lower the rate: the same command "
            "goes on from the checkpoint before"
        )
