"""The layout stage: patches and back, variance 1, what the captions tell is learned, the other states stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latentgen.data import Picture
from latentgen.errors import InputError
from latentgen.models import create
from latentgen.training.captions import CaptionTable
from latentgen.training.draw import Draw
from latentgen.training.layout import LayoutObjective, patches, unpatched
from latentgen.training.loop import LoopSettings, TrainState, fit

NAMES = ("left", "right", "top", "bottom")
GRID, SIDE, CONTEXT = 2, 16, 12


def picture(name: str, shade: int) -> np.ndarray:
    """Dark on one side."""
    found = np.full((SIDE, SIDE, 3), 255 - shade, np.uint8)
    half = SIDE // 2
    where = {"left": np.s_[:, :half], "right": np.s_[:, half:], "top": np.s_[:half], "bottom": np.s_[half:]}[name]
    found[where] = shade
    return found


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([picture(name, shade) for shade in (0, 20, 40) for name in NAMES])


@pytest.fixture(scope="module")
def table() -> CaptionTable:
    return CaptionTable([Picture(Path(f"{n}.png"), (f"dark on the {NAMES[n % 4]}",)) for n in range(12)])


@pytest.fixture(scope="module")
def words(table: CaptionTable) -> Any:
    return create.tokenizer(table.texts, 540, CONTEXT)


def made(pixels: np.ndarray, table: CaptionTable, words: Any, **settings: Any) -> LayoutObjective:
    torch.manual_seed(0)
    clip = create.clip(words, size=SIDE, patch=8, width=32, heads=2, text_layers=2, image_layers=1)
    held = pixels[:4], [f"dark on the {name}" for name in NAMES]
    frozen = create.text_tower(clip).requires_grad_(False)  # as it comes from a finished folder
    return LayoutObjective(
        frozen, words, pixels, table, held, np.ones(len(pixels)), Accelerator(),
        **{"grid": GRID, **settings},
    )  # fmt: skip


def test_patches_are_cut_row_by_row_and_put_back() -> None:
    pictures = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    cut = patches(pictures, 2)
    assert cut.shape == (2, 4, 48)
    torch.testing.assert_close(cut[0, 1].reshape(3, 4, 4), pictures[0, :, :4, 4:], rtol=0, atol=0)
    torch.testing.assert_close(cut[1, 2].reshape(3, 4, 4), pictures[1, :, 4:, :4], rtol=0, atol=0)
    torch.testing.assert_close(unpatched(cut, 2), pictures, rtol=0, atol=0)


def test_to_say_nothing_costs_one_and_explains_nothing(pixels: np.ndarray, table: CaptionTable, words: Any) -> None:
    objective = made(pixels, table, words)
    with torch.no_grad():
        objective.module["head"].weight.zero_()
        objective.module["head"].bias.zero_()
        found = objective.loss(np.arange(12), Draw(0, 0, 12))
    assert float(found["layout"]) == pytest.approx(1.0, abs=1e-4)
    assert float(found["drift"]) == pytest.approx(0.0, abs=1e-10)
    assert objective.validate()["explained"] == pytest.approx(0.0, abs=1e-6)


def test_it_learns_where_things_are_from_the_caption(pixels: np.ndarray, table: CaptionTable, words: Any) -> None:
    objective = made(pixels, table, words, caption_dropout=0.0)
    settings = LoopSettings(steps=150, batch=12, rate=3e-3, warmup=5, ema=0.9)
    state = TrainState.start(objective.module, settings)
    first, before = dict(objective.validate()), objective._before.state_dict()
    for _ in fit(objective, state, settings, Accelerator(), seed=0):
        pass
    state.swap_average()
    last = objective.validate()
    assert first["explained"] < 0.1 and last["explained"] > 0.6, (first, last)
    assert any(not torch.equal(value, before[name]) for name, value in objective.module["text"].state_dict().items())
    sheet = objective.sheet()
    assert sheet is not None and sheet.size[0] > 4 * 64


def test_keeping_the_states_keeps_them(pixels: np.ndarray, table: CaptionTable, words: Any) -> None:
    def drifted(keep: float) -> float:
        objective = made(pixels, table, words, keep=keep)
        settings = LoopSettings(steps=30, batch=12, rate=3e-3, warmup=5, ema=0.5)
        state = TrainState.start(objective.module, settings)
        for _ in fit(objective, state, settings, Accelerator(), seed=0):
            pass
        ids = objective._ids
        with torch.no_grad():
            new, old = (net(ids).last_hidden_state for net in (objective.module["text"], objective._before))
        return float((new - old)[:, : CONTEXT - GRID**2].square().mean())

    assert drifted(10.0) < 0.3 * drifted(0.0)


def test_a_context_without_room_and_pictures_too_small_are_refused(
    pixels: np.ndarray, table: CaptionTable, words: Any
) -> None:
    with pytest.raises(InputError, match="context = 13"):
        made(pixels, table, words, grid=3)
    with pytest.raises(InputError, match="smaller grid"):
        made(pixels[:, :4, :4], table, words)
