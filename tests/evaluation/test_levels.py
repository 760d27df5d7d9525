"""What the networks know without rendering, where the truth is known: grey levels drawn evenly hold eight bits each."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.checkpoint import open_checkpoint
from latentgen.diffusion.denoiser import Condition
from latentgen.diffusion.schedule import from_config
from latentgen.evaluation import levels
from latentgen.evaluation.levels import look_inside
from latentgen.models.latent import Moments

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
EVEN = 1 / 3  # the variance of a number drawn evenly from [-1, 1]


class Plain:
    """A pipeline whose latents are the pixels and a little noise, and whose denoiser is a Gaussian's own."""

    def __init__(self, std: float, variance: float) -> None:
        self.std, self.variance, self.told = std, variance, [""]
        self.plan = from_config(SCHEDULER)
        self.latent = self.text = self

    def encode(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            return Moments(given, torch.full_like(given, self.std))
        self.told = [*given]
        return Condition(torch.zeros(len(given), 1, 1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents * 0.5 + 0.5).clamp(0, 1)

    def network(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
        times = torch.as_tensor(self.plan.schedule.time(self.plan.schedule.logsnr(grid)))
        logsnr = torch.as_tensor(self.plan.schedule.logsnr(grid))[
            torch.searchsorted(times, time.double()).clamp(max=20000)
        ]
        alpha2, sigma2 = torch.sigmoid(logsnr), torch.sigmoid(-logsnr)
        scale = sigma2.sqrt() / (alpha2 * self.variance + sigma2)
        return x * scale.to(x)[:, None, None, None]


def seen(monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, std: float, variance: float) -> levels.Inside:
    engine = Plain(std, variance)
    monkeypatch.setattr(levels, "open_engine", lambda *_, **__: engine)
    captions: Sequence[str] = ["noise"] * len(pixels)
    return look_inside(SimpleNamespace(config=lambda part: SCHEDULER), pixels, captions)  # type: ignore[arg-type]


def test_bits_of_pixels_lie_above_what_the_pictures_hold_and_not_far(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    inside = seen(monkeypatch, pixels, 0.05, EVEN + 0.05**2)
    assert inside.pixel_bits is not None and inside.bits is not None
    # a Gaussian in place of the even distribution costs 1/2·log2(2·pi·e/12) = 0.25, a Laplace in place of noise 0.1
    assert 8.0 < inside.pixel_bits.value < 8.6
    density = 0.5 * np.log2(2 * np.pi * np.e * (EVEN + 0.05**2))  # of the latents, under that Gaussian
    assert inside.bits.value == pytest.approx(density, abs=0.1)


def test_bits_of_pixels_say_when_a_model_takes_the_pictures_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    right, wrong = (seen(monkeypatch, pixels, 0.05, variance).pixel_bits for variance in (EVEN, 30.0))
    assert right is not None and wrong is not None and wrong.value > right.value + 0.5


def test_stable_diffusion_xl_is_told_its_pictures_sizes(xl: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    inside = look_inside(open_checkpoint(xl), pixels, ["a red apple", "a blue bird"])
    assert np.isfinite(inside.loss.value) and inside.loss.count == 2 and inside.bits is not None
