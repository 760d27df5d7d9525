"""One scheduler's config read as another's gives the levels that diffusers' `OtherScheduler.from_config` has."""

import importlib
import math
import sys
import types
from typing import Any

import diffusers
import numpy as np
import pytest

from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule import LOGSNR_MAX, from_config
from latentgen.diffusion.schedule.reading import SCHEDULERS, plan_for
from latentgen.errors import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 12
SIGMAS = {  # sampler -> diffusers' scheduler, and which of its levels are ours: those of second order have each twice
    "euler": ("EulerDiscreteScheduler", 1),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", 1),
    "lms": ("LMSDiscreteScheduler", 1),
    "heun": ("HeunDiscreteScheduler", 2),
    "dpmpp-sde": ("DPMSolverSDEScheduler", 2),
}


@pytest.fixture(autouse=True)
def torchsde(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPMSolverSDEScheduler wants it for its noise, which is not drawn here."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))


def theirs_of(name: str, config: dict[str, Any]) -> Any:
    if name == "DPMSolverSDEScheduler":
        kind = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    else:
        kind = getattr(diffusers, name)
    scheduler = kind.from_config({key: value for key, value in config.items() if key != "_class_name"})
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("sampler", SIGMAS)
@pytest.mark.parametrize("own", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
def test_the_levels_and_the_start_are_those_of_diffusers(sampler: str, own: str, spacing: str | None) -> None:
    config: dict[str, Any] = {**SD, "_class_name": own, "steps_offset": 1, "set_alpha_to_one": False}
    config |= {} if spacing is None else {"timestep_spacing": spacing}
    name, every = SIGMAS[sampler]
    theirs, plan = theirs_of(name, config), plan_for(config, sampler)
    levels = plan.knots(STEPS)
    assert plan.sampler == sampler and levels[-1] == LOGSNR_MAX and theirs.sigmas[-1] == 0
    assert np.allclose(np.exp(-0.5 * levels[:-1]), theirs.sigmas[:-1:every].numpy(), rtol=1e-5)
    assert np.allclose(plan.schedule.time(levels[:-1]), theirs.timesteps[::every].numpy(), atol=1e-3)
    first = plan.initial_scale(levels[0]) / plan.schedule.marginal(levels[0])[0]  # theirs is x/alpha
    assert math.isclose(first, float(theirs.init_noise_sigma), rel_tol=1e-5)


@pytest.mark.parametrize("sampler", SIGMAS)
@pytest.mark.parametrize("own", [False, True])
def test_sigma_min_ends_the_walk_where_diffusers_class_has_that_key(sampler: str, own: bool) -> None:
    name, _ = SIGMAS[sampler]
    config: dict[str, Any] = {**SD, "_class_name": name if own else "UniPCMultistepScheduler"}
    config["final_sigmas_type"] = "sigma_min"
    plan, last = plan_for(config, sampler), theirs_of(name, config).sigmas[-1]
    assert math.isclose(math.exp(-0.5 * plan.knots(STEPS)[-1]), float(last), rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_a_lambda_that_is_clipped_at_nothing_is_no_bound(name: str) -> None:
    config = {**SD, "_class_name": name}
    plain = from_config(config).knots(STEPS)
    for lowest in (None, -math.inf):
        assert np.array_equal(from_config({**config, "lambda_min_clipped": lowest}).knots(STEPS), plain)
    with pytest.raises(InputError, match="lambda_min_clipped is not supported"):
        from_config({**config, "lambda_min_clipped": -5.1})


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - set(SCHEDULERS)))
def test_samplers_that_diffusers_has_not_end_without_noise(sampler: str) -> None:
    plan = plan_for({**SD, "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1}, sampler)
    assert plan.sampler == sampler and plan.knots(STEPS)[-1] == LOGSNR_MAX
