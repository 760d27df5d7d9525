"""Samplers against closed forms: exact scores of a Gaussian and of a mixture."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import gaussian, two_modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling import SAMPLERS, TABLE, Sampler, ddim, ddim_inversion, ddpm, dpmpp_2m
from latentgen.diffusion.sampling.adaptive import dormand_prince, flow_slope
from latentgen.diffusion.schedule import (
    VE,
    Cosine,
    Discrete,
    RectifiedFlow,
    SubVP,
    knots,
    straight_line,
    variance_exploding,
    variance_preserving,
)
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.errors import InputError

START, END = -6.0, 5.0
FRAMES = {"vp": variance_preserving, "ve": variance_exploding, "flow": straight_line, "sub-vp": SubVP().marginal}


def last(sampler: Sampler, denoise: Any, x: Any, levels: np.ndarray, marginal: Any, noise: Any = None) -> Any:
    for step in sampler(denoise, x, levels, marginal, noise):
        x = step.x
    return x


def start_of(shape: tuple[int, ...], marginal: Any, level: float = START) -> np.ndarray:
    """Noise as it lies at a level where hardly any data is left."""
    alpha, sigma = marginal(level)
    return math.sqrt(alpha**2 + sigma**2) * np.random.default_rng(0).standard_normal(shape)


def exact_end(data: Any, x: np.ndarray) -> np.ndarray:
    """The probability-flow ODE solved to 1e-11."""
    for step in dormand_prince(flow_slope(data.denoise), x, START, END, rtol=1e-11, atol=1e-12):
        x = step.y
    return x


def test_the_ode_carries_a_gaussian_along_its_closed_form() -> None:
    x = start_of((4, 8), variance_preserving)
    (alpha, sigma), (alpha_end, sigma_end) = variance_preserving(START), variance_preserving(END)
    z = (x - alpha * 0.3) / math.hypot(alpha * 0.5, sigma)
    expected = alpha_end * 0.3 + math.hypot(alpha_end * 0.5, sigma_end) * z
    assert np.allclose(exact_end(gaussian(0.3, 0.5, variance_preserving), x), expected, atol=1e-9)


ORDERS = [
    ("ddim", {}, 1.0),
    ("euler", {}, 1.0),
    ("heun", {}, 2.0),
    ("dpmpp-2m", {}, 2.0),
    ("dpmpp-2m", {"solver": "heun"}, 2.0),
    ("dpmpp-2m", {"order": 3}, 2.0),  # the authors' third-order weight is half of Taylor's: see docs
    ("unipc", {}, 2.0),
    ("unipc", {"order": 3, "lower_order_final": False}, 3.0),
    ("deis", {}, 2.0),
    ("deis", {"order": 3}, 2.9),
    ("lms", {}, 3.5),
    ("plms", {}, 2.0),
    ("pndm", {}, 2.0),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=lambda value: str(value))
def test_the_order_of_convergence_is_the_one_stated(name: str, options: dict[str, Any], order: float) -> None:
    data = two_modes(variance_preserving)
    x = start_of((4, 8), variance_preserving)
    exact = exact_end(data, x)
    errors = []
    for steps in (80, 160):
        levels = np.linspace(START, END, steps + 1)
        end = last(partial(SAMPLERS[name], **options), data.denoise, x, levels, variance_preserving)
        errors.append(float(np.sqrt(np.mean((end - exact) ** 2))))
    assert math.log2(errors[0] / errors[1]) > order - 0.12


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"langevin", "predictor-corrector", "lcm", "ddpm"}))
def test_a_sampler_walks_the_same_way_in_every_frame(name: str) -> None:
    """x/alpha is one and the same path in the VP, VE, flow and sub-VP frames."""
    levels, ends = np.linspace(START, END, 13), []
    for marginal in FRAMES.values():
        alpha = marginal(START)[0]
        x = alpha * np.random.default_rng(2).standard_normal((2, 6)) / variance_preserving(START)[0]
        denoise = two_modes(marginal).denoise
        ends.append(last(SAMPLERS[name], denoise, x, levels, marginal, Noise([3, 4])) / marginal(END)[0])
    for end in ends[1:]:
        assert np.allclose(end, ends[0], atol=2e-3 if name == "probability-flow" else 1e-6)


def test_ddim_with_eta_one_is_ddpm_and_euler_ancestral() -> None:
    data, levels, x = two_modes(variance_preserving), np.linspace(START, END, 21), np.ones((2, 5))
    ends = [
        last(sampler, data.denoise, x, levels, variance_preserving, Noise([1, 2]))
        for sampler in (partial(ddim, eta=1.0), ddpm, SAMPLERS["euler-ancestral"], partial(dpmpp_2m, order=1, eta=1.0))
    ]
    assert np.allclose(ends[0], ends[1], atol=1e-12) and np.allclose(ends[0], ends[2], atol=1e-12)
    assert np.allclose(ends[0], ends[3], atol=1e-9)  # SDE-DPM-Solver++ (1) is DDPM too


def test_the_round_trip_of_the_ode_returns() -> None:
    data, x = two_modes(variance_preserving), start_of((3, 4), variance_preserving)
    there = exact_end(data, x)
    back = there
    for step in dormand_prince(flow_slope(data.denoise), there, END, START, rtol=1e-10, atol=1e-11):
        back = step.y
    assert np.allclose(back, x, atol=1e-7)


def test_ddim_inversion_returns_and_more_iterations_return_better() -> None:
    data, levels = two_modes(variance_preserving), np.linspace(START, END, 41)
    clean = 0.5 * np.random.default_rng(1).standard_normal((3, 4))
    gaps = []
    for iterations in (1, 3, 20):
        noise = last(partial(ddim_inversion, iterations=iterations), data.denoise, clean, levels, variance_preserving)
        again = last(ddim, data.denoise, noise, levels, variance_preserving)
        gaps.append(float(np.abs(again - clean).max()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-8


def test_the_adaptive_solver_keeps_its_tolerance() -> None:
    data, x = two_modes(variance_preserving), start_of((4, 8), variance_preserving)
    exact, errors = exact_end(data, x), []
    for tolerance in (1e-3, 1e-5, 1e-7):
        sampler = partial(SAMPLERS["probability-flow"], rtol=tolerance, atol=tolerance)
        end = last(sampler, data.denoise, x, np.array([START, END]), variance_preserving)
        errors.append(float(np.abs(end - exact).max()))
        assert errors[-1] < 30 * tolerance
    assert errors[0] > errors[1] > errors[2]


STOCHASTIC: list[tuple[str, dict[str, Any], int]] = [
    ("ddpm", {}, 100),
    ("ddim", {"eta": 0.5}, 100),
    ("euler-ancestral", {}, 100),
    ("dpmpp-2m-sde", {}, 60),
    ("dpmpp-sde", {}, 40),
    ("probability-flow", {}, 40),
    ("dpmpp-2m", {}, 40),
    ("predictor-corrector", {}, 120),
    ("langevin", {"step": 0.1, "repeats": 12}, 60),
]


@pytest.mark.parametrize(("name", "options", "steps"), STOCHASTIC, ids=lambda value: str(value))
@pytest.mark.parametrize("frame", ["vp", "ve"])
def test_sde_ode_and_langevin_all_draw_from_the_data(
    name: str, options: dict[str, Any], steps: int, frame: str
) -> None:
    """A two-sample Kolmogorov–Smirnov test against draws from the mixture itself."""
    marginal = FRAMES[frame]
    data = two_modes(marginal)
    levels = np.append(np.linspace(START, 8, steps), 40.0)
    x = start_of((1, 4000), marginal)
    drawn = last(partial(SAMPLERS[name], **options), data.denoise, x, levels, marginal, Noise([5]))
    assert ks_2samp(drawn[0], data.draw((20000,), seed=9)).pvalue > 1e-3


TRAILING = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
FROM_NOISE: dict[str, dict[str, Any]] = {  # schedules whose first step leaves nothing but noise
    "cosine": {**TRAILING, "beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {**TRAILING, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
}


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"langevin", "lcm"}))
@pytest.mark.parametrize("schedule", FROM_NOISE)
def test_a_first_step_out_of_pure_noise_does_no_harm(name: str, schedule: str) -> None:
    plan = plan_for(FROM_NOISE[schedule], name)
    levels = plan.knots(20)
    assert levels[0] < -15
    x = plan.initial_scale(levels[0]) * np.random.default_rng(0).standard_normal((1, 4000)).astype(np.float32)
    data, sampler = gaussian(0.3, 0.5, plan.schedule.marginal), partial(SAMPLERS[name], **plan.options)
    end = last(sampler, data.denoise, x, levels, plan.schedule.marginal, Noise([5]))
    assert end.mean() == pytest.approx(0.3, abs=0.03) and end.std() == pytest.approx(0.5, abs=0.09)


@pytest.mark.parametrize("name", ["plms", "pndm"])
@pytest.mark.parametrize("schedule", ["cosine", "zero-snr"])
def test_what_is_extrapolated_from_noise_alone_does_no_harm_either(name: str, schedule: str) -> None:
    plan = plan_for({**FROM_NOISE[schedule], "prediction_type": "epsilon"}, name)
    levels, marginal = plan.knots(20), plan.schedule.marginal
    x = np.random.default_rng(0).standard_normal((1, 4000)).astype(np.float32)
    end = last(partial(SAMPLERS[name], of="eps"), gaussian(0.3, 0.5, marginal).denoise, x, levels, marginal)
    assert end.mean() == pytest.approx(0.3, abs=0.03) and end.std() == pytest.approx(0.5, abs=0.09)


@pytest.mark.parametrize("schedule", FROM_NOISE)
def test_langevin_out_of_pure_noise_is_refused_too_few_steps(schedule: str) -> None:
    plan = plan_for(FROM_NOISE[schedule], "langevin")
    with pytest.raises(InputError, match="'langevin' takes 100 steps or more"):
        plan.knots(99)
    data, levels = gaussian(0.3, 0.5, plan.schedule.marginal), plan.knots(100)
    x = np.random.default_rng(0).standard_normal((1, 4000))
    end = last(SAMPLERS["langevin"], data.denoise, x, levels, plan.schedule.marginal, Noise([5]))
    assert end.mean() == pytest.approx(0.3, abs=0.03) and end.std() == pytest.approx(0.5, abs=0.09)


def test_probability_flow_walks_to_the_cleanest_level_whatever_the_steps_are() -> None:
    plan = plan_for(FROM_NOISE["cosine"], "probability-flow")
    data, x = gaussian(0.3, 0.5, plan.schedule.marginal), np.random.default_rng(0).standard_normal((2, 32))
    sampler = partial(SAMPLERS["probability-flow"], **plan.options)
    ends = [last(sampler, data.denoise, x, plan.knots(n), plan.schedule.marginal) for n in (1, 2, 14, 200)]
    alpha, sigma = plan.schedule.marginal(plan.knots(1)[0])
    exact = 0.3 + 0.5 * (x - alpha * 0.3) / math.hypot(alpha * 0.5, sigma)
    assert all(np.array_equal(end, ends[0]) for end in ends) and np.abs(ends[0] - exact).max() < 2e-3


def test_a_network_that_is_not_finite_is_said_at_once() -> None:
    seen: list[float] = []

    def denoise(x: Any, logsnr: float) -> Any:
        seen.append(logsnr)
        return x * math.nan if logsnr > 0 else 0 * x

    with pytest.raises(InputError, match="output is not finite at logSNR"):
        last(SAMPLERS["probability-flow"], denoise, np.ones((1, 2)), np.array([START, END]), variance_preserving)
    assert len(seen) < 100


def test_fixed_large_variance_draws_from_the_data_in_many_steps() -> None:
    data, levels = two_modes(variance_preserving), np.append(np.linspace(START, 8, 400), 40.0)
    x = start_of((1, 3000), variance_preserving)
    sampler = partial(ddpm, variance="fixed-large")
    drawn = last(sampler, data.denoise, x, levels, variance_preserving, Noise([5]))
    assert ks_2samp(drawn[0], data.draw((20000,), seed=9)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["dpmpp-2m-sde", "dpmpp-sde"])
def test_more_steps_of_an_sde_sampler_refine_the_same_picture(name: str) -> None:
    data, x, ends = two_modes(variance_preserving), start_of((2, 64), variance_preserving), []
    for steps in (16, 64, 256):
        levels = np.linspace(START, END, steps + 1)
        ends.append(last(SAMPLERS[name], data.denoise, x, levels, variance_preserving, Noise([7, 8])))
    coarse = float(np.sqrt(np.mean((ends[0] - ends[2]) ** 2)))
    fine = float(np.sqrt(np.mean((ends[1] - ends[2]) ** 2)))
    assert fine < 0.7 * coarse and fine < 0.2  # independent noise would give 1


def test_lcm_of_one_step_is_the_estimate_of_x0() -> None:
    data, x = two_modes(variance_preserving), np.ones((2, 3))
    levels = np.array([START, 40.0])
    assert np.array_equal(last(SAMPLERS["lcm"], data.denoise, x, levels, variance_preserving), data.denoise(x, START))


def test_heun_evaluates_twice_a_step_and_once_for_the_last() -> None:
    seen: list[float] = []
    data = two_modes(variance_preserving)

    def denoise(x: Any, logsnr: float) -> Any:
        seen.append(logsnr)
        return data.denoise(x, logsnr)

    costs = {"ddim": 10, "dpmpp-2m": 10, "unipc": 10, "lms": 10, "heun": 19, "plms": 11, "pndm": 19, "dpmpp-sde": 19}
    for name, cost in costs.items():
        seen.clear()
        levels = np.append(np.linspace(START, END, 10), 40.0)
        last(SAMPLERS[name], denoise, np.ones((2, 3)), levels, variance_preserving, Noise([0, 1]))
        assert len(seen) == cost, name


SCHEDULES = {
    "scaled-linear": Discrete.scaled_linear(),
    "zero-snr": Discrete.scaled_linear(rescale_betas_zero_snr=True),
    "cosine": Cosine(),
    "ve": VE(),
    "flow": RectifiedFlow(),
}


@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(["trailing", "leading", "linspace", "karras"]),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    steps=st.integers(1, 7),
    kind=st.sampled_from(["float32", "float64"]),
    in_torch=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_sampler_stays_finite_and_keeps_shape_kind_and_dtype(
    name: str, schedule: str, spacing: str, shape: list[int], batch: int, steps: int, kind: str, in_torch: bool
) -> None:
    chosen = SCHEDULES[schedule]
    levels = knots(chosen, steps, spacing=spacing)
    x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(kind)
    state: Any = torch.from_numpy(x) if in_torch else x
    denoise = two_modes(chosen.marginal).denoise
    ends = list(SAMPLERS[name](denoise, state, levels, chosen.marginal, Noise(range(batch))))
    end = ends[-1].x
    assert type(end) is type(state) and end.dtype == state.dtype and end.shape == state.shape
    assert bool(np.isfinite(np.asarray(end)).all()) and bool(np.isfinite(np.asarray(ends[-1].x0)).all())
    assert ends[-1].logsnr == levels[-1] and [step.index for step in ends] == list(range(len(ends)))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"probability-flow"}))
def test_a_picture_is_that_of_its_own_seed_alone(name: str) -> None:
    noise, levels = Noise([11, 12, 13]), knots(SCHEDULES["cosine"], 6)
    denoise = two_modes(variance_preserving).denoise
    together = last(SAMPLERS[name], denoise, noise.initial((4, 5)), levels, variance_preserving, noise)
    for k, seed in enumerate(noise.seeds):
        alone = Noise([seed])
        end = last(SAMPLERS[name], denoise, alone.initial((4, 5)), levels, variance_preserving, alone)
        assert np.array_equal(end[0], together[k])


def test_knots_that_go_the_wrong_way_and_missing_seeds_are_refused() -> None:
    denoise, x = two_modes(variance_preserving).denoise, np.ones((1, 2))
    for wrong in ([1.0, 0.0], [0.0], [0.0, np.nan], [-50.0, 0.0], [-1.0, -1.0, 2.0], [-1.0, 2.0, 1.0]):
        levels = np.array(wrong)
        with pytest.raises(InputError):
            last(ddim, denoise, x, levels, variance_preserving)
    for name in ("ddpm", "euler-ancestral", "dpmpp-2m-sde", "langevin", "predictor-corrector", "lcm"):
        with pytest.raises(InputError, match="seeds"):
            last(SAMPLERS[name], denoise, x, np.array([-2.0, 0.0, 1.0]), variance_preserving)
    for options in ({"order": 4}, {"solver": "euler"}):
        with pytest.raises(InputError):
            last(partial(dpmpp_2m, **options), denoise, x, np.array([-2.0, 0.0]), variance_preserving)


def test_the_table_for_people_names_every_sampler_once_and_says_which_draw_noise() -> None:
    assert sorted(note.name for note in TABLE) == sorted(SAMPLERS)
    denoise, levels = two_modes(variance_preserving).denoise, np.array([-3.0, -1.0, 0.0, 1.0])
    for note in TABLE:
        assert all(str(field) for field in note[:5]) and note.when
        try:
            last(SAMPLERS[note.name], denoise, np.ones((1, 2)), levels, variance_preserving)
            drew = False
        except InputError:
            drew = True
        assert drew == note.random, note.name


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_last_knot_that_stays_is_walked_to(name: str) -> None:
    levels = np.array([-3.0, -1.0, 0.5, 2.0, 2.0])
    denoise, x = two_modes(variance_preserving).denoise, np.random.default_rng(0).standard_normal((2, 3))
    end = last(SAMPLERS[name], denoise, x, levels, variance_preserving, Noise([0, 1]))
    assert np.isfinite(end).all()
