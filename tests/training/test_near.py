"""Rows of a training set are the array's own, wherever they are taken from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from latentgen.training import near
from latentgen.training.draw import Draw
from latentgen.training.near import Near

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_rows_are_the_arrays_in_the_order_asked_for(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float16).reshape(6, 4)
    np.save(tmp_path / "kept.npy", array)
    for held in (array, np.load(tmp_path / "kept.npy", mmap_mode="r")):
        taken = Near(held).take(np.array([4, 0, 4]), CPU)
        assert taken.dtype == torch.float16
        np.testing.assert_array_equal(taken.numpy(), array[[4, 0, 4]])
        taken.zero_()  # it is a copy: what was asked for may be changed
    assert array[4, 0] == 16


@needs_gpu
@pytest.mark.parametrize("share", [8, 2**62])
def test_a_gpu_has_the_same_rows_whether_it_holds_them_or_not(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "SHARE", share)
    array = np.random.default_rng(0).integers(0, 255, (50, 3, 3), np.uint8)
    rows = np.array([3, 49, 3, 0])
    np.testing.assert_array_equal(Near(array).take(rows, torch.device("cuda")).cpu().numpy(), array[rows])


@needs_gpu
def test_what_a_gpu_draws_is_a_function_of_seed_and_step_whoever_shares_the_batch() -> None:
    gpu = torch.device("cuda")
    whole, again = (Draw(3, 5, 600) for _ in range(2))
    first, second = (whole.normal(2, 4, device=gpu) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, again.normal(2, 4, device=gpu))
    part = Draw(3, 5, 600, slice(100, 300)).normal(2, 4, device=gpu)
    assert torch.equal(part, first[100:300])
    assert not torch.equal(first, Draw(3, 6, 600).normal(2, 4, device=gpu))
    assert abs(float(first.mean())) < 0.06 and abs(float(first.std()) - 1) < 0.05
