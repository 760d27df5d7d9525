"""The network is the U-Net itself, in its own type, with gradients only where they are wanted."""

import copy
from typing import Any

import pytest
import torch

from latentgen.diffusion.denoiser import Condition
from latentgen.models.network import unet_network

X, TIME = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 999.0])
CONDITION = Condition(states=torch.randn(2, 16, 16))


def test_the_output_is_the_unets_at_each_rows_own_time(parts: dict[str, Any]) -> None:
    network = unet_network(parts["unet"])
    out = network(X, TIME, CONDITION)
    for row in range(2):
        with torch.no_grad():
            expected = parts["unet"](X[row : row + 1], TIME[row], CONDITION.states[row : row + 1]).sample
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("training", "asked", "recorded"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_gradients_are_recorded_in_training_mode_or_as_asked(
    parts: dict[str, Any], training: bool, asked: bool | None, recorded: bool
) -> None:
    unet = copy.deepcopy(parts["unet"]).train(training)
    assert unet_network(unet, gradients=asked)(X, TIME, CONDITION).requires_grad is recorded
    with torch.no_grad():
        assert not unet_network(unet, gradients=asked)(X, TIME, CONDITION).requires_grad


def test_a_half_precision_unet_answers_in_the_type_of_x(parts: dict[str, Any]) -> None:
    half = copy.deepcopy(parts["unet"]).to(torch.bfloat16)
    out = unet_network(half)(X, TIME, CONDITION)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, unet_network(parts["unet"])(X, TIME, CONDITION), atol=0.1, rtol=0.1)
