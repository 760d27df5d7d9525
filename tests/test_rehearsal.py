"""What `--dry-run` says of a stage's size."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.rehearsal import gflop_of
from latentgen.training.draw import Draw
from latentgen.training.loop import LoopSettings

WIDTH = 64
PRODUCT = 2 * WIDTH * WIDTH / 1e9  # GFLOP of one row through a square matrix


class HalfFrozen:
    """A frozen matrix before a trained one."""

    splits = True
    judge = ("loss", -1)
    weights = np.ones(16)

    def __init__(self) -> None:
        self.module = nn.Linear(WIDTH, WIDTH)
        self._frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        return {"loss": self.module(self._frozen(torch.ones(len(items), WIDTH))).mean()}


def test_what_is_frozen_has_no_backward_pass() -> None:
    objective = HalfFrozen()

    found = gflop_of(objective, LoopSettings(steps=1, batch=4, rate=1e-3), Accelerator(cpu=True))

    assert found == pytest.approx(3 * PRODUCT)  # two forward, and the gradient of the trained weights
    assert all(weight.grad is None for weight in objective.module.parameters())
