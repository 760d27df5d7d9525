"""Order and noise are pure functions of seed and step, whatever the processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.training.draw import STEP, VALIDATION, Draw, Order, _key

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


@pytest.mark.parametrize("total", [8, 256, 264, 2048])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_rows_do_not_depend_on_how_many_processes_share_the_batch(parts: int, total: int) -> None:
    def drawn(rows: slice) -> list[torch.Tensor]:
        draw = Draw(5, 17, total, rows)
        told = [draw.uniform(), draw.normal(2, 3), draw.uniform(2), draw.stratified()]
        shared.append(draw.shared(3))
        return [*told, draw.normal(1)]

    shared: list[list[float]] = []
    share = total // parts
    split = [drawn(slice(part * share, (part + 1) * share)) for part in range(parts)]
    for whole, pieces in zip(drawn(slice(None)), zip(*split, strict=True), strict=True):
        assert len(whole) == total and torch.equal(whole, torch.cat(pieces))
    assert all(each == shared[0] for each in shared)


@pytest.mark.parametrize("total", [1, 100, 256])
def test_a_batch_of_up_to_256_rows_has_the_numbers_it_had_when_every_batch_was_drawn_whole(total: int) -> None:
    draw, before = Draw(5, 17, total), torch.Generator().manual_seed(_key(STEP, 5, 17))
    assert torch.equal(draw.normal(2, 3), torch.randn((total, 2, 3), generator=before))
    assert torch.equal(draw.uniform(), torch.rand(total, generator=before))
    assert draw.shared(2) == torch.rand(2, generator=before).tolist()
    assert torch.equal(draw.normal(1), torch.randn((total, 1), generator=before))


def test_a_part_of_a_large_batch_draws_hardly_more_than_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = torch.randn

    def counted(shape: tuple[int, ...], **named: object) -> torch.Tensor:
        drawn.append(shape[0])
        return real(shape, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "randn", counted)
    for rows, most in ((slice(64, 96), 32), (slice(2040, 2048), 32), (slice(100, 200), 128), (slice(0, 2048), 2048)):
        drawn.clear()
        assert len(Draw(0, 0, 2048, rows).normal(4)) == rows.stop - rows.start
        assert sum(drawn) == most


def test_every_row_of_a_large_batch_has_numbers_of_its_own() -> None:
    found = Draw(0, 0, 1000).normal(64)
    assert not set(Draw(0, 0, 1000).shared(64)) & set(Draw(0, 0, 1000).uniform(64).flatten().tolist())
    assert len(found.unique()) > 0.999 * found.numel()
    assert abs(float(found.mean())) < 0.02 and float(found.std()) == pytest.approx(1, abs=0.02)


def test_step_seed_and_stream_each_change_the_numbers() -> None:
    first = Draw(0, 0, 4).normal(8)
    for other in (Draw(0, 1, 4), Draw(1, 0, 4), Draw(0, 0, 4, stream=VALIDATION)):
        assert not torch.equal(first, other.normal(8))


def test_times_are_spread_evenly_over_the_batch() -> None:
    times = Draw(0, 3, 16).stratified()
    assert ((times >= 0) & (times < 1)).all()
    np.testing.assert_allclose(np.diff(np.sort(times.numpy())), 1 / 16, atol=1e-6)
    assert not torch.equal(times, times.sort().values)
