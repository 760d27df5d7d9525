"""CLIP's loss: equal captions answer for each other, knowing nothing costs log(batch), gradients reach both towers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from latentgen.data import Picture
from latentgen.models import create
from latentgen.training.captions import CaptionTable
from latentgen.training.clip import ClipObjective, shift, to_unit, tokens
from latentgen.training.draw import Draw

CAPTIONS = [("a red apple", "an apple"), ("a blue bird",), ("a red apple",), ("a green frog", "frog"), ("a cat",)]


@pytest.fixture(scope="module")
def table() -> CaptionTable:
    return CaptionTable([Picture(Path(f"{n}.png"), captions) for n, captions in enumerate(CAPTIONS)])


@pytest.fixture(scope="module")
def words(table: CaptionTable) -> Any:
    return create.tokenizer(table.texts, 530, 12)


@pytest.fixture
def objective(table: CaptionTable, words: Any) -> ClipObjective:
    torch.manual_seed(0)
    model = create.clip(words, size=16, patch=8, width=16, heads=2, text_layers=1, image_layers=1)
    pixels = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    held = pixels[:3], ["a red apple", "a blue bird", "a cat"]
    return ClipObjective(model, words, pixels, table, held, np.ones(len(CAPTIONS)), Accelerator())


def fix(monkeypatch: pytest.MonkeyPatch, objective: ClipObjective, images: torch.Tensor, texts: torch.Tensor) -> None:
    monkeypatch.setattr(objective, "image_features", lambda _: images)
    monkeypatch.setattr(objective, "text_features", lambda _: texts)


def test_knowing_nothing_costs_the_logarithm_of_the_batch(
    objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = F.normalize(torch.ones(4, 16), dim=-1)
    fix(monkeypatch, objective, same, same)
    loss = objective.loss(np.array([0, 1, 3, 4]), Draw(0, 0, 4))["loss"]
    assert float(loss.detach()) == pytest.approx(math.log(4), abs=1e-5)


def test_random_towers_start_near_chance(objective: ClipObjective) -> None:
    with torch.no_grad():
        objective.module.logit_scale.zero_()  # temperature 1
        loss = objective.loss(np.array([1, 2, 3, 4]), Draw(0, 0, 4))["loss"]
    assert float(loss) == pytest.approx(math.log(4), abs=0.3)


def test_equal_captions_are_right_answers_for_each_other(
    objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = np.array([2, 1, 2, 4])  # rows 0 and 2 have one caption
    axes = F.normalize(torch.eye(4)[[0, 1, 0, 3]], dim=-1)
    fix(monkeypatch, objective, axes, axes)
    with torch.no_grad():
        objective.module.logit_scale.fill_(math.log(100))
        loss = float(objective.loss(items, Draw(0, 0, 4))["loss"])
    assert loss == pytest.approx(math.log(2) / 2, abs=1e-5)  # the entropy of its targets: there is no better answer


def test_the_loss_is_the_cross_entropy_of_the_paper_where_no_captions_coincide(objective: ClipObjective) -> None:
    items = np.array([1, 2, 4])
    with torch.no_grad():
        loss = float(objective.loss(items, Draw(0, 5, 3))["loss"])
        draw = Draw(0, 5, 3)
        chosen = objective._captions.choose(items, draw.uniform().numpy())
        pixels = shift(to_unit(objective._near.array[items], torch.device("cpu")), draw.uniform(2), 3)
        images, texts = objective.image_features(pixels), objective.text_features(objective._ids[chosen])
        logits = objective.module.logit_scale.exp() * images @ texts.T
        right = torch.arange(3)
        expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    assert loss == pytest.approx(float(expected), abs=1e-5)


def test_the_gradient_reaches_both_towers_and_descends(objective: ClipObjective) -> None:
    items = np.arange(5)
    first = objective.loss(items, Draw(0, 0, 5))["loss"]
    first.backward()
    named = dict(objective.module.named_parameters())
    for part in ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale"):
        reached = [w.grad for name, w in named.items() if name.startswith(part) and w.grad is not None]
        assert sum(float(grad.abs().sum()) for grad in reached) > 0, part
    with torch.no_grad():
        for weight in named.values():
            weight -= 1e-3 * (weight.grad if weight.grad is not None else 0)
        assert float(objective.loss(items, Draw(0, 0, 5))["loss"]) < float(first.detach())


def test_features_are_those_of_the_model_itself(objective: ClipObjective) -> None:
    objective.module.eval()
    with torch.no_grad():
        out = objective.module(
            input_ids=objective._ids, pixel_values=to_unit(objective._near.array, torch.device("cpu"))
        )
        torch.testing.assert_close(objective.text_features(objective._ids), out.text_embeds, atol=1e-6, rtol=1e-5)
        images = objective.image_features(to_unit(objective._near.array, torch.device("cpu")))
        torch.testing.assert_close(images, out.image_embeds, atol=1e-6, rtol=1e-5)


def test_validation_tells_retrieval_beside_chance(objective: ClipObjective, monkeypatch: pytest.MonkeyPatch) -> None:
    fix(monkeypatch, objective, torch.eye(3), torch.eye(3)[[0, 1, 1]])
    figures = objective.validate()
    assert figures["retrieval_image_at_1"] == pytest.approx(2 / 3)
    assert figures["chance"] == pytest.approx(1 / 3) and figures["pairs"] == 3


def test_a_picture_of_an_equal_caption_is_found_as_well(
    objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective._held_out = objective._held_out[0], ["a cat", "a red apple", "a cat"]
    fix(monkeypatch, objective, torch.eye(3), torch.eye(3)[[2, 1, 0]])
    figures = objective.validate()
    assert figures["retrieval_image_at_1"] == figures["retrieval_text_at_1"] == 1
    assert figures["chance"] == pytest.approx(5 / 9)


def test_each_picture_draws_among_its_own_captions(table: CaptionTable) -> None:
    items = np.repeat(np.arange(5), 50)
    chosen = table.choose(items, np.tile(np.linspace(0, 1, 50, endpoint=False), 5))
    for item, captions in enumerate(CAPTIONS):
        assert {table.texts[number] for number in chosen[items == item]} == set(captions)
    other = CaptionTable([Picture(Path(f"{n}.png"), c) for n, c in enumerate([*CAPTIONS[1:], CAPTIONS[0]])])
    assert table.fingerprint() != other.fingerprint()


def test_ids_are_padded_and_cut_to_the_context(words: Any) -> None:
    ids = tokens(words, ["a cat", "a red apple " * 9, ""])
    assert ids.shape == (3, 12)
    assert (ids[:, 0] == words.bos_token_id).all() and (ids[:, -1] == words.eos_token_id).all()
    assert tokens(words, []).shape == (0, 12)


def test_pictures_move_by_whole_pixels_and_not_at_all_in_the_middle() -> None:
    pictures = torch.randn(3, 3, 8, 8)
    offsets = torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.5, 0.999]])
    moved = shift(pictures, offsets, 2)
    assert torch.equal(moved[0], pictures[0])
    assert torch.equal(moved[1, :, 2:], pictures[1, :, :-2])
    assert torch.equal(moved[2, :, :, :-2], pictures[2, :, :, 2:])
    assert torch.equal(
        to_unit(np.array([[[[0, 255, 51]]]], np.uint8), torch.device("cpu")).flatten(), torch.tensor([-1, 1, -0.6])
    )
