"""Order and noise are pure functions of seed and step, whatever the processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.training.draw import VALIDATION, Draw, Order

BATCH = 7


def seen(order: Order, steps: int) -> np.ndarray:
    return np.concatenate([order.items(step) for step in range(steps)])


@given(seed=st.integers(0, 2**40), items=st.integers(1, 50), batch=st.integers(1, 20), step=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_a_step_has_the_same_items_whichever_steps_were_asked_before(
    seed: int, items: int, batch: int, step: int
) -> None:
    weights = np.ones(items)
    walked = Order(weights, batch, seed)
    for before in range(step):
        walked.items(before)
    fresh = Order(weights, batch, seed)
    np.testing.assert_array_equal(walked.items(step), fresh.items(step))
    fresh.items(step + 9)
    np.testing.assert_array_equal(walked.items(step), fresh.items(step))


@pytest.mark.parametrize("items", [1, 5, 23, 70])
def test_every_item_is_seen_once_an_epoch(items: int) -> None:
    sequence = seen(Order(np.ones(items), BATCH, 3), 3 * items)[: 3 * items]
    for epoch in sequence.reshape(3, items):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(items))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = seen(Order(np.ones(50), 50, 3), 2).reshape(2, 50)
    assert (order[0] != order[1]).any()
    assert (order[0] != Order(np.ones(50), 50, 4).items(0)).any()


@given(weights=st.lists(st.floats(0, 3), min_size=1, max_size=30).filter(lambda values: sum(values) > 1))
@settings(max_examples=40, deadline=None)
def test_an_item_is_seen_as_often_as_its_weight_to_within_one_an_epoch(weights: list[float]) -> None:
    order = Order(np.array(weights), 1, 0)
    scale = order.epoch_size / sum(weights)
    counts = np.bincount(seen(order, order.epoch_size), minlength=len(weights))
    assert (np.abs(counts - scale * np.array(weights)) <= 1 + 1e-9).all()
    assert not counts[np.array(weights) == 0].any()


def test_weights_hold_on_average() -> None:
    order = Order(np.array([0.25, 1.0, 2.5]), 5, 1)
    counts = np.bincount(seen(order, 400), minlength=3)
    np.testing.assert_allclose(counts / counts.sum(), np.array([0.25, 1.0, 2.5]) / 3.75, atol=0.03)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_do_not_depend_on_how_many_processes_share_the_batch(parts: int) -> None:
    def drawn(rows: slice) -> list[torch.Tensor]:
        draw = Draw(5, 17, 8, rows)
        return [draw.uniform(), draw.normal(2, 3), draw.uniform(2), draw.stratified(), draw.normal(1)]

    share = 8 // parts
    split = [drawn(slice(part * share, (part + 1) * share)) for part in range(parts)]
    for whole, pieces in zip(drawn(slice(None)), zip(*split, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_step_seed_and_stream_each_change_the_numbers() -> None:
    first = Draw(0, 0, 4).normal(8)
    for other in (Draw(0, 1, 4), Draw(1, 0, 4), Draw(0, 0, 4, stream=VALIDATION)):
        assert not torch.equal(first, other.normal(8))


def test_times_are_spread_evenly_over_the_batch() -> None:
    times = Draw(0, 3, 16).stratified()
    assert ((times >= 0) & (times < 1)).all()
    np.testing.assert_allclose(np.diff(np.sort(times.numpy())), 1 / 16, atol=1e-6)
    assert not torch.equal(times, times.sort().values)
