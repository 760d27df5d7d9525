"""What an evaluation renders, and when a rendering of before may stand for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentgen.evaluation import run
from latentgen.evaluation.run import DIVERSE, EACH, Artist, Order, evaluate

ICONS = Path(__file__).parents[1] / "data" / "icons"


class Stopped(Exception):
    """Enough was seen."""


def test_diversity_is_measured_on_captions_of_all_kinds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is sorted by style, as the icons are, and holds 9 pictures out."""
    asked: list[list[str]] = []

    def draw(artist: Artist, captions: list[str]) -> np.ndarray:
        asked.append(list(captions))
        if len(asked) == 2:
            raise Stopped
        return np.zeros((len(captions), 32, 32, 3), np.uint8)

    monkeypatch.setattr(Artist, "draw", draw)
    monkeypatch.setattr(run, "DIVERSE", 3)
    with pytest.raises(Stopped):
        evaluate(folder, Order(ICONS, steps=2), tmp_path)
    captions, several = asked
    turns = np.random.default_rng(0).permutation(len(captions))  # as the curves take them
    assert several == [captions[k] for k in turns[:3] for _ in range(EACH)]
    assert several[::EACH] != captions[:3] and DIVERSE == 8
