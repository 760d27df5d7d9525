"""Checkpoints of a training run: written aside, proved, renamed; a torn one is refused by name, the one before used."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from latentgen.durable import MANIFEST, sha256, write_folder
from latentgen.training.loop import TrainState


class Snapshots:
    """The checkpoints of one stage in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def save(self, state: TrainState) -> Path:
        """Write the state of this step; only when it is whole are the oldest removed."""

        def write(folder: Path) -> None:
            for name, tensors in state.tensors().items():
                save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": state.step, "skipped": state.skipped}) + "\n")

        target = write_folder(self.folder / f"step-{state.step:08d}", write)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def restore(self, state: TrainState) -> list[str]:
        """Load the newest whole checkpoint into `state`, if there is one; returns a line for each that was refused."""
        refused = []
        for folder in reversed(self._all()):
            flaw = _flaw(folder)
            if flaw is None:
                kept = json.loads((folder / "state.json").read_text())
                files = ("model", "average", "optimizer")
                state.load({name: load_file(folder / f"{name}.safetensors") for name in files}, kept["step"])
                state.skipped = kept["skipped"]
                break
            refused.append(f"checkpoint {folder} is refused: {flaw}")
        return refused


def _flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file is what its manifest says."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"its {MANIFEST} is missing or torn"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} was altered or torn"
    return None
