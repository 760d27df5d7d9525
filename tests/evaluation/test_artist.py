"""What an evaluation renders, and when a rendering of before may stand for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentgen.checkpoint import open_checkpoint
from latentgen.evaluation import run
from latentgen.evaluation.run import DIVERSE, EACH, Artist, Order, evaluate
from latentgen.pipeline import terms_of

ICONS = Path(__file__).parents[1] / "data" / "icons"


class Stopped(Exception):
    """Enough was seen."""


def test_diversity_is_measured_on_captions_of_all_kinds(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is sorted by style, as the icons are, and holds 9 pictures out."""
    asked: list[list[str]] = []

    def draw(artist: Artist, captions: list[str]) -> np.ndarray:
        asked.append(list(captions))
        if len(asked) == 2:
            raise Stopped
        return np.zeros((len(captions), 32, 32, 3), np.uint8)

    folder = make_folder(extra_files={"latentgen.json": '{"sample_size": 32}'})
    pipe = SimpleNamespace(terms=terms_of(open_checkpoint(folder)), machine=None)
    monkeypatch.setattr(run, "Pipeline", SimpleNamespace(from_pretrained=lambda _: pipe))
    monkeypatch.setattr(Artist, "draw", draw)
    monkeypatch.setattr(run, "DIVERSE", 3)
    with pytest.raises(Stopped):
        evaluate(folder, Order(ICONS, steps=2), tmp_path)
    captions, several = asked
    turns = np.random.default_rng(0).permutation(len(captions))  # as the curves take them
    assert several == [captions[k] for k in turns[:3] for _ in range(EACH)]
    assert several[::EACH] != captions[:3] and DIVERSE == 8


class Counting:
    """In a pipeline's place: counts its calls."""

    def __init__(self, engine: str | None) -> None:
        self.machine = None if engine is None else {"engine": engine}
        self.calls = 0

    def __call__(self, texts: list[str], **_: Any) -> Any:
        self.calls += 1
        return SimpleNamespace(images=np.zeros((len(texts), 4, 4, 3)))


def test_a_rendering_is_found_again_only_for_the_version_and_the_engine_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def artist(engine: str | None) -> Any:
        return Artist(Counting(engine), "print", {}, 0, tmp_path, lambda _: None)  # type: ignore[arg-type]

    first = artist("onnx")
    first.draw(["a cat"])
    first.draw(["a cat"])
    again = artist("onnx")
    again.draw(["a cat"])
    assert (first.pipe.calls, again.pipe.calls) == (1, 0)
    for other in (artist("torch"), artist(None), replace(again, seed=1)):
        before = other.pipe.calls
        other.draw(["a cat"])
        assert other.pipe.calls == before + 1
    monkeypatch.setattr(run, "__version__", "0.0.0")
    before = again.pipe.calls
    again.draw(["a cat"])
    assert again.pipe.calls == before + 1
