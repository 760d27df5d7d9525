"""Figures as TensorBoard logs: written where the package is there, a line where it is not."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from latentgen import build
from latentgen.errors import InputError
from latentgen.training import board
from latentgen.training.board import Board

FIGURES = {1: {"step": 1.0, "loss": 0.5, "rate": 0.25}, 2: {"step": 2.0, "loss": 0.125, "rate": 0.5}}
EXPECTED = {
    ("unet/loss", 1, 0.5),
    ("unet/rate", 1, 0.25),
    ("unet/loss", 2, 0.125),
    ("unet/rate", 2, 0.5),
}


def write(folder: Path, main: bool = True) -> None:
    with Board.beside(folder, "unet", main) as logs:
        for step, figures in FIGURES.items():
            logs.figures(step, figures)


def test_the_event_file_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "unet-abc")
    read = EventAccumulator(str(tmp_path / "tensorboard" / "unet-abc"))
    read.Reload()
    found = {(tag, each.step, each.value) for tag in read.Tags()["scalars"] for each in read.Scalars(tag)}
    assert found == EXPECTED


class Writer:
    """Stands in for SummaryWriter."""

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.closed = folder, [], False
        WRITERS.append(self)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, step, value))


WRITERS: list[Any] = []


def test_every_figure_goes_to_the_writer_and_the_main_process_alone_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(board, "find_spec", lambda name: name)
    WRITERS.clear()
    write(tmp_path / "unet-abc", main=False)
    assert not WRITERS
    write(tmp_path / "unet-abc")
    (writer,) = WRITERS
    assert set(writer.scalars) == EXPECTED and writer.closed
    assert Path(writer.folder) == tmp_path / "tensorboard" / "unet-abc"
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    write(tmp_path / "unet-abc")
    assert len(WRITERS) == 1 and not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_run_says_once_that_it_is_not_there(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "find_spec", lambda name: name if there else None)
    said: list[str] = []
    tiny = Path(__file__).parents[1] / "data" / "tiny.toml"
    with pytest.raises(InputError, match="does not exist"):  # past its first lines
        build.train(tiny, tmp_path / "out", tmp_path / "nowhere", said.append)
    assert sum("tensorboard is not installed" in line for line in said) == (not there)
