"""Schedules: their ends, their inverses, their frames and their knots, on floats, NumPy arrays and torch tensors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.diffusion.guidance import time_of
from latentgen.diffusion.loss import learned_schedule
from latentgen.diffusion.schedule import (
    EDM,
    LOGSNR_MAX,
    LOGSNR_MIN,
    SPACINGS,
    VE,
    Cosine,
    Discrete,
    Linear,
    RectifiedFlow,
    SubVP,
    UniformLogsnr,
    knots,
)
from latentgen.errors import InputError

SCHEDULES: dict[str, Any] = {
    "scaled-linear": Discrete.scaled_linear(),
    "sigma-interpolated": Discrete.scaled_linear(interpolation="sigma"),
    "zero-snr": Discrete.scaled_linear(rescale_betas_zero_snr=True),
    "table-cosine": Discrete.cosine(),
    "linear": Linear(),
    "sub-vp": SubVP(),
    "cosine": Cosine(),
    "cosine-shifted": Cosine(size=256),
    "uniform-logsnr": UniformLogsnr(),
    "ve": VE(),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "flow-shifted": RectifiedFlow(3.0),
}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@each
def test_logsnr_falls_stays_bounded_and_is_the_same_on_every_kind_of_array(schedule: Any) -> None:
    t = np.linspace(0, 1, 257)
    one_by_one = np.array([schedule.logsnr(float(value)) for value in t])
    assert np.all(np.diff(one_by_one) < 0)
    assert np.all((one_by_one >= LOGSNR_MIN) & (one_by_one <= LOGSNR_MAX))
    assert np.allclose(schedule.logsnr(t), one_by_one, rtol=1e-9, atol=1e-7)
    assert np.allclose(schedule.logsnr(torch.from_numpy(t)).numpy(), one_by_one, rtol=1e-9, atol=1e-7)
    inner = schedule.logsnr(torch.from_numpy(t[1:-1]).float())
    assert inner.dtype == torch.float32
    assert np.allclose(inner.numpy(), one_by_one[1:-1], rtol=1e-3, atol=1e-3)
    assert bool(torch.isfinite(schedule.logsnr(torch.tensor([0.0, 1.0]))).all())


@each
def test_the_frame_has_the_logsnr_it_was_asked_for(schedule: Any) -> None:
    for level in np.linspace(-30, 30, 13):
        alpha, sigma = schedule.marginal(float(level))
        assert math.isclose(2 * math.log(alpha / sigma), level, rel_tol=1e-9, abs_tol=1e-9)
    levels = torch.linspace(-30, 30, 13)
    alpha, sigma = schedule.marginal(levels)
    assert bool(torch.isfinite(alpha).all()) and bool((sigma > 0).all()) and bool((alpha > 0).all())


def test_frames_keep_their_invariants() -> None:
    levels = np.linspace(-12, 12, 25)
    alpha, sigma = Cosine().marginal(levels)
    assert np.allclose(alpha**2 + sigma**2, 1)
    alpha, sigma = RectifiedFlow().marginal(levels)
    assert np.allclose(alpha + sigma, 1)
    alpha, sigma = SubVP().marginal(levels)
    assert np.allclose(sigma, 1 - alpha**2)
    assert np.all(VE().marginal(levels)[0] == 1)


@pytest.mark.parametrize("name", ["scaled-linear", "sigma-interpolated", "linear", "sub-vp", "cosine", "ve", "flow"])
def test_time_is_the_inverse_of_logsnr(name: str) -> None:
    schedule = SCHEDULES[name]
    scale = 999 if isinstance(schedule, Discrete) else 1000
    t = np.linspace(0.01, 0.99, 99)
    assert np.allclose(schedule.time(schedule.logsnr(t)), scale * t, atol=1e-6)
    in_torch = schedule.time(schedule.logsnr(torch.from_numpy(t).float()))
    assert np.allclose(in_torch.numpy(), scale * t, atol=0.05)
    assert time_of(schedule, schedule.logsnr(0.3)) == pytest.approx(0.3, abs=1e-6)


def test_linear_is_the_integral_of_its_betas_and_edm_and_flow_are_their_formulas() -> None:
    t = 0.4
    grid = np.linspace(0, t, 100_001)
    integral = np.trapezoid(0.1 + (20 - 0.1) * grid, grid)
    assert Linear().marginal(Linear().logsnr(t))[0] ** 2 == pytest.approx(math.exp(-integral), rel=1e-9)
    assert SubVP().marginal(SubVP().logsnr(t))[0] ** 2 == pytest.approx(math.exp(-integral), rel=1e-9)
    sigma = (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert EDM().logsnr(t) == pytest.approx(2 * math.log(0.5 / sigma))
    assert EDM().time(EDM().logsnr(t)) == pytest.approx(math.log(sigma) / 4)
    shifted = 3 * t / (1 + 2 * t)
    assert RectifiedFlow(3).marginal(RectifiedFlow(3).logsnr(t))[1] == pytest.approx(shifted)
    assert RectifiedFlow.for_resolution(1024**2, 512**2).shift == 2


@pytest.mark.parametrize("interpolation", ["logsnr", "sigma"])
def test_a_table_is_exact_at_its_entries(interpolation: str) -> None:
    schedule = Discrete.scaled_linear(interpolation=interpolation)
    table = np.array(schedule.table)
    for index in (0, 1, 500, 999):
        level = schedule.at(float(index))
        assert schedule.marginal(level)[0] ** 2 == pytest.approx(table[index], rel=1e-12)
        assert schedule.time(level) == pytest.approx(index, abs=1e-9)
    assert schedule.logsnr(1.0) == schedule.at(999) and schedule.logsnr(0.0) == schedule.at(0)


def test_a_zero_terminal_snr_is_finite() -> None:
    schedule = Discrete.scaled_linear(rescale_betas_zero_snr=True)
    assert schedule.table[-1] == 0 and schedule.logsnr(1.0) == LOGSNR_MIN
    alpha, sigma = schedule.marginal(schedule.logsnr(1.0))
    assert 0 < alpha < 1e-8 and sigma == 1


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 60),
    spacing=st.sampled_from([spacing for spacing in SPACINGS if spacing != "lcm"]),
    final=st.sampled_from(["zero", "first"]),
    start=st.floats(0.3, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_knots_of_any_kind_go_from_noise_to_clean(
    name: str, steps: int, spacing: str, final: Any, start: float
) -> None:
    if int(steps * start) < 1:
        return
    levels = knots(SCHEDULES[name], steps, spacing=spacing, final=final, start=start)
    assert levels.dtype == np.float64 and len(levels) == int(steps * start) + 1
    assert np.all(np.isfinite(levels)) and np.all(np.diff(levels) >= -1e-9)
    assert levels[-1] == (LOGSNR_MAX if final == "zero" else SCHEDULES[name].logsnr(0.0))


def test_spacings_are_what_their_names_say() -> None:
    schedule = VE()
    sigma = np.exp(-0.5 * knots(schedule, 9, spacing="karras", within="whole", final="first")[:-1])
    assert np.allclose(np.diff(sigma ** (1 / 7), 2), 0, atol=1e-9)
    assert sigma[0] == pytest.approx(50) and sigma[-1] == pytest.approx(0.01)
    for name in ("exponential", "uniform-logsnr"):
        levels = knots(schedule, 9, spacing=name, within="whole")[:-1]
        assert np.allclose(np.diff(levels, 2), 0, atol=1e-9)
    table = Discrete.scaled_linear()
    assert [table.time(level) for level in knots(table, 4)[:-1]] == [999, 749, 499, 249]
    leading = knots(table, 4, spacing="leading", steps_offset=1)
    assert [table.time(level) for level in leading[:-1]] == [751, 501, 251, 1]
    assert [round(table.time(level)) for level in knots(table, 3, spacing=[999, 500, 20])[:-1]] == [999, 500, 20]


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (0, {}),
        (1001, {}),
        (5, {"spacing": "sideways"}),
        (5, {"start": 0.0}),
        (5, {"start": 0.1}),
        (5, {"spacing": [1, 2, 3, 4, 5]}),
        (5, {"final": "never"}),
    ],
)
def test_knots_that_cannot_be_are_refused_in_one_line(steps: int, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        knots(Discrete.scaled_linear(), steps, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_a_flow_are_what_its_network_is_told(shift: float) -> None:
    schedule = RectifiedFlow(shift)
    levels = knots(schedule, 4, spacing=[999, 800, 500, 200])
    assert np.allclose(schedule.time(levels[:-1]), [999, 800, 500, 200]) and levels[-1] == LOGSNR_MAX
    for wrong in ([1001, 800], [800, -1]):
        with pytest.raises(InputError, match="the schedule has 0 to 1000"):
            knots(schedule, 2, spacing=wrong)


def test_times_outside_a_continuous_schedule_are_refused() -> None:
    assert np.allclose(knots(VE(), 2, spacing=[0.9, 0.1])[:-1], VE().logsnr(np.array([0.9, 0.1])))
    for wrong in ([5.0, 0.6], [0.6, -0.1]):
        with pytest.raises(InputError, match=r"the schedule has 0 to 1$"):
            knots(VE(), 2, spacing=wrong)


def test_steps_that_would_fall_on_one_level_are_refused_by_their_number() -> None:
    table = Discrete.scaled_linear()
    tried: list[dict[str, Any]] = [{"steps_offset": 1, "spacing": "leading"}]
    tried += [{"clean_counts": True, "spacing": "linspace"}]
    for options in tried:
        with pytest.raises(InputError, match=f"1000 steps do not fit the 1000 levels.*{options['spacing']} spaced"):
            knots(table, 1000, **options)
    assert len(knots(table, 1000)) == len(knots(table, 1000, spacing="karras", clean_counts=True)) == 1001


def test_a_learned_schedule_is_monotone_meets_its_ends_and_takes_gradients() -> None:
    schedule, weights = learned_schedule(hidden=32, logsnr_min=-9, logsnr_max=8, seed=1)
    levels = schedule.logsnr(torch.linspace(0, 1, 50)).detach()
    assert bool((levels.diff() < 0).all())
    assert float(levels[0]) == pytest.approx(8) and float(levels[-1]) == pytest.approx(-9, abs=1e-4)
    schedule.logsnr(torch.rand(8)).sum().backward()
    assert all(weight.grad is not None for weight in weights)
