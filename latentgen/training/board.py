"""The figures of a stage as TensorBoard logs, where the package tensorboard is installed; else nothing is written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ABSENT = (
    'tensorboard is not installed, so no logs are written for it (pip install "latentgen[tensorboard]"); '
    "log.jsonl and report.html have the same figures"
)


def is_there() -> bool:
    """Whether the package tensorboard is installed."""
    return find_spec("tensorboard") is not None


class Board:
    """Scalars of one stage; a stage that goes on after a stop goes on in the same folder."""

    def __init__(self, writer: Any, name: str) -> None:
        self._writer, self._name = writer, name

    @classmethod
    @contextmanager
    def beside(cls, folder: Path, name: str, main: bool) -> Iterator["Board"]:
        """Logs in `tensorboard/` beside the stage's own folder, all stages of a run together; main process alone."""
        if not main or not is_there():
            yield cls(None, name)
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder.parent / "tensorboard" / folder.name)) as writer:
            yield cls(writer, name)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Each figure at a step, as STAGE/FIGURE."""
        if self._writer is not None:
            for figure, value in figures.items():
                if figure != "step":
                    self._writer.add_scalar(f"{self._name}/{figure}", value, step)
