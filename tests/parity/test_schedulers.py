"""Every sampler that diffusers has, against its scheduler, step by step, from the same latents and the same model.

The model is a fixed function of (x, time). diffusers keeps its tables and levels in float32 whatever the state is, so
deviations are taken relative to the largest value on the way; with the tables' own rounding they stay below 1e-5.
"""

import importlib
import itertools
import math
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentgen.diffusion.denoiser import Condition, Denoiser
from latentgen.diffusion.guidance import guided
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS, ddim, ddim_inversion
from latentgen.diffusion.schedule import EDM, VE, Plan, RectifiedFlow, from_config, knots
from latentgen.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
TOLERANCES = [(torch.float64, 1e-5), (torch.float32, 1e-4)]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def model(x: torch.Tensor, time: torch.Tensor, condition: Condition | None) -> torch.Tensor:
    """A smooth function of x and the time, neither linear nor small."""
    t = (time / 1000).reshape(-1, 1, 1, 1).to(x.dtype)
    return 0.7 * torch.tanh(x * (0.5 + t)) + 0.2 * torch.sin(3 * t)


class Tape(Noise):
    """Noise that both sides draw in the same order."""

    def __init__(self) -> None:
        object.__setattr__(self, "seeds", (0, 1))
        object.__setattr__(self, "generator", torch.Generator().manual_seed(3))

    def step(self, index: int, like_: Any, span: Any = None) -> Any:
        return torch.randn(like_.shape, generator=self.generator, dtype=torch.float32).to(like_.dtype)

    def brownian(self, levels: Sequence[float]) -> Noise:
        return self


def scheduler(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**(SD | options))


def plan_of(theirs: Any) -> Plan:
    return from_config(dict(theirs.config) | {"_class_name": type(theirs).__name__})


def latents(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def walked(theirs: Any, steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch | None) -> list[torch.Tensor]:
    """x after every step of diffusers' scheduler, as the network would see it (in the VP frame)."""
    theirs.set_timesteps(steps)
    if type(theirs).__name__ == "DEISMultistepScheduler":
        theirs.sigmas = theirs.sigmas.double()  # its third-order coefficients lose 3e-5 to float32 logarithms
    if monkeypatch is not None:
        tape = Tape()
        source = type(theirs).__module__
        monkeypatch.setattr(f"{source}.randn_tensor", lambda shape, **_: tape.step(0, torch.empty(shape, dtype=dtype)))
    x, states = latents(dtype) * theirs.init_noise_sigma, []
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
        x = theirs.step(model(seen, torch.as_tensor(t, dtype=dtype).expand(2), None), t, x).prev_sample
        states.append(x)
    return states


def ours(plan: Plan, steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    knots = plan.knots(steps)
    denoiser = Denoiser(model, plan.schedule, plan.prediction)
    denoise = guided(denoiser, Condition(), clip=plan.clip)
    x = latents(dtype) * plan.initial_scale(knots[0])
    walk = SAMPLERS[plan.sampler](denoise, x, knots, plan.schedule.marginal, Tape(), **plan.options)
    return [step.x for step in walk]


def in_vp(theirs: Any, plan: Plan, states: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """diffusers' states as ours: the sigma family's are x/alpha, and Heun takes two of its steps for one."""
    if type(theirs).__name__ in SIGMA_FAMILY:
        alphas = [plan.schedule.marginal(level)[0] for level in plan.knots(steps)[1:]]
        states = states[1::2] + states[-1:] if type(theirs).__name__ == "HeunDiscreteScheduler" else states
        return [alpha * x for alpha, x in zip(alphas, states, strict=True)]
    return states[1:] if plan.sampler == "plms" else states  # the first PLMS step takes two of diffusers'


SIGMA_FAMILY = {
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
}


def deviation(theirs: Any, steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch | None = None) -> float:
    plan = plan_of(theirs)
    reference = in_vp(theirs, plan, walked(theirs, steps, dtype, monkeypatch), steps)
    states = ours(plan, steps, dtype)
    assert len(reference) == len(states) == steps
    assert all(bool(torch.isfinite(x).all()) for x in (*reference, *states))
    scale = max(float(x.abs().max()) for x in reference)
    gaps = [float((x - y).abs().max()) for x, y in zip(reference, states, strict=True)]
    return max(gaps) / max(scale, 1.0)


CASES: list[tuple[str, Mapping[str, Any]]] = [
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ode_samplers_walk_as_diffusers(name: str, options: Mapping[str, Any], spacing: str, offset: int) -> None:
    for prediction, (dtype, bound) in itertools.product(PREDICTIONS, TOLERANCES):
        for steps in (7, 20):
            theirs = scheduler(
                name, **options, timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction
            )
            assert deviation(theirs, steps, dtype) < bound, (prediction, dtype, steps)


TABLE_CASES: list[tuple[str, Mapping[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.8}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("name", "options"), TABLE_CASES, ids=lambda value: str(value))
def test_table_and_sde_samplers_walk_as_diffusers(
    name: str, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = PREDICTIONS[:2] if "Ancestral" in name else PREDICTIONS
    # diffusers adds fixed-large noise after the last step too, unless that is at time 0; Ho et al. do not. DDIM's and
    # DDPM's own steps go to t − N//steps, which do not meet in "linspace" (see below)
    spacings = SPACINGS[:1] if "fixed_large" in options.values() else SPACINGS[: 3 if name.startswith("DD") else 4]
    for (spacing, offset), prediction, (dtype, bound) in itertools.product(spacings, predictions, TOLERANCES):
        keywords = {} if name == "LCMScheduler" else {"timestep_spacing": spacing, "steps_offset": offset}
        theirs = scheduler(name, **options, **keywords, prediction_type=prediction)
        gap = deviation(theirs, 20, dtype, monkeypatch)
        assert gap < bound, (spacing, prediction, dtype)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("rescale", [False, True])
def test_every_beta_table_and_its_zero_snr_form(name: str, betas: str, rescale: bool) -> None:
    prediction = "v_prediction" if rescale else "epsilon"
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    for spacing in ("leading", "trailing"):
        theirs = scheduler(
            name,
            beta_schedule=betas,
            rescale_betas_zero_snr=rescale,
            timestep_spacing=spacing,
            prediction_type=prediction,
            **options,
        )
        table = np.array(plan_of(theirs).schedule.table)
        expected = theirs.alphas_cumprod.numpy().copy()
        assert np.abs(table[:-1] - expected[:-1]).max() < (1e-6 if rescale else 1e-12)
        for dtype, bound in TOLERANCES:
            assert deviation(theirs, 20, dtype) < (1e-4 if rescale else bound), (spacing, dtype)


WALKED = [  # diffusers cannot walk Karras levels of the cosine table: two of them round to one time
    (name, options, betas)
    for (name, options), betas in itertools.product([*CASES, *TABLE_CASES], BETAS)
    if betas != "squaredcos_cap_v2" or not options.get("use_karras_sigmas")
]


@pytest.mark.parametrize(("name", "options", "betas"), WALKED, ids=lambda value: str(value))
def test_every_sampler_walks_every_beta_table(
    name: str, options: Mapping[str, Any], betas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the noisiest "leading" level: at the cosine's last one, where sigma/alpha is 20,291, diffusers' float32
    levels alone cost 1e-3."""
    spacing = {} if name == "LCMScheduler" else {"timestep_spacing": "leading"}
    tape = monkeypatch if (name, options) in TABLE_CASES else None
    for prediction, (dtype, bound) in itertools.product(PREDICTIONS[:2], TOLERANCES):
        theirs = scheduler(name, **options, **spacing, beta_schedule=betas, prediction_type=prediction)
        assert deviation(theirs, 20, dtype, tape) < bound, (prediction, dtype)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("skip", [True, False])
def test_plms_and_pndm_walk_every_beta_table(betas: str, skip: bool) -> None:
    for dtype, bound in TOLERANCES:
        theirs = scheduler("PNDMScheduler", skip_prk_steps=skip, steps_offset=1, beta_schedule=betas)
        assert pndm_deviation(theirs, 20, dtype, skip) < bound, dtype


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])  # all that diffusers' has
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS[:3])  # its steps go to t − N//steps, which meet in these
def test_plms_and_pndm_walk_as_diffusers(skip: bool, to_one: bool, prediction: str, spacing: str, offset: int) -> None:
    options = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": prediction}
    for dtype, bound in TOLERANCES:
        theirs = scheduler("PNDMScheduler", skip_prk_steps=skip, set_alpha_to_one=to_one, **options)
        assert pndm_deviation(theirs, 20, dtype, skip) < bound, dtype


def pndm_deviation(theirs: Any, steps: int, dtype: torch.dtype, skip: bool) -> float:
    """Runge-Kutta takes four of diffusers' steps for each of the first three; PLMS two for the first."""
    states = walked(theirs, steps, dtype, None)
    states = states[1:] if skip else states[3:12:4] + states[12:]
    gaps = [float((x - y).abs().max()) for x, y in zip(states, ours(plan_of(theirs), steps, dtype), strict=True)]
    return max(gaps) / max(float(x.abs().max()) for x in states)


def test_clipped_ddim_is_diffusers_with_its_clipped_output() -> None:
    theirs = scheduler("DDIMScheduler", clip_sample=True, clip_sample_range=0.8, set_alpha_to_one=False)
    theirs.set_timesteps(20)
    plan = plan_of(theirs)
    denoise = guided(Denoiser(model, plan.schedule, plan.prediction), Condition(), clip=plan.clip)
    x = latents(torch.float64)
    for t, step in zip(theirs.timesteps, ddim(denoise, x, plan.knots(20), plan.schedule.marginal), strict=True):
        out = model(x, t.double().expand(2), None)
        x = theirs.step(out, t, x, use_clipped_model_output=True).prev_sample
        assert float((step.x - x).abs().max()) < 1e-5


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_each_ddim_step_where_diffusers_own_steps_do_not_meet(spacing: str) -> None:
    """diffusers steps to t − N//steps whatever the next t is; each of its steps is ours between those two levels."""
    theirs = scheduler("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
    theirs.set_timesteps(30)
    plan = plan_of(theirs)
    denoise = guided(Denoiser(model, plan.schedule, plan.prediction), Condition())
    x = latents(torch.float64)
    for t in theirs.timesteps:
        reached = theirs.step(model(x, t.double().expand(2), None), t, x).prev_sample
        to = int(t) - 1000 // 30
        pair = np.array([plan.schedule.at(int(t)), plan.schedule.at(to) if to >= 0 else plan.knots(1)[-1]])
        (step,) = ddim(denoise, x, pair, plan.schedule.marginal)
        assert float((step.x - reached).abs().max()) < 1e-5 * float(x.abs().max())
        x = reached


def test_ddim_with_noise_is_diffusers_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(20)
    plan, tape = plan_of(theirs), Tape()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda shape, **_: noise)
    denoise = guided(Denoiser(model, plan.schedule, plan.prediction), Condition())
    x = latents(torch.float64)
    walk = ddim(denoise, x, plan.knots(20), plan.schedule.marginal, Tape(), eta=0.7)
    for t, step in zip(theirs.timesteps, walk, strict=True):
        noise = tape.step(0, x)
        x = theirs.step(model(x, t.double().expand(2), None), t, x, eta=0.7).prev_sample
        assert float((step.x - x).abs().max()) < 1e-5 * float(x.abs().max())


def test_learned_range_variance_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def both_halves(x: torch.Tensor, time: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        return torch.cat([model(x, time, condition), torch.sin(x)], dim=1)

    theirs = scheduler("DDPMScheduler", clip_sample=False, variance_type="learned_range")
    theirs.set_timesteps(20)
    plan, tape = plan_of(theirs), Tape()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: tape.step(0, x))
    denoise = guided(Denoiser(both_halves, plan.schedule, plan.prediction), Condition(), variance=True)
    x = latents(torch.float64)
    walk = SAMPLERS["ddpm"](denoise, x, plan.knots(20), plan.schedule.marginal, Tape(), **plan.options)
    for t, step in zip(theirs.timesteps, walk, strict=True):
        x = theirs.step(both_halves(x, t.double().expand(2), None), t, x).prev_sample
        assert float((step.x - x).abs().max()) < 1e-5 * float(x.abs().max())


def test_ddim_inversion_is_diffusers_inverse_scheduler() -> None:
    inverse = scheduler("DDIMInverseScheduler", clip_sample=False, set_alpha_to_one=False)
    inverse.set_timesteps(20)
    plan = plan_of(scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False))
    denoise = guided(Denoiser(model, plan.schedule, plan.prediction), Condition())
    x = latents(torch.float64)
    for t, step in zip(
        inverse.timesteps, ddim_inversion(denoise, x, plan.knots(20), plan.schedule.marginal), strict=True
    ):
        x = inverse.step(model(x, t.double().expand(2), None), int(t), x).prev_sample
        assert float((step.x - x).abs().max()) < 1e-5 * float(x.abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_is_diffusers_flow_matching(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12).tolist())
    schedule = RectifiedFlow(shift)
    levels = knots(schedule, 12)
    assert np.allclose(schedule.time(levels[:-1]), theirs.timesteps.numpy(), atol=1e-3)
    denoise = guided(Denoiser(model, schedule, Prediction("flow")), Condition())
    x = latents(torch.float64)
    for t, step in zip(theirs.timesteps, ddim(denoise, x, levels, schedule.marginal), strict=True):
        x = theirs.step(model(x, t.double().expand(2), None), t, x).prev_sample.double()
        assert float((step.x - x).abs().max()) < 1e-5  # diffusers keeps x in float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_matching_config_gives_diffusers_own_levels(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(14)
    plan = plan_of(theirs)
    levels = plan.knots(14)
    sigmas = [plan.schedule.marginal(level)[1] for level in levels]
    assert np.allclose(sigmas, theirs.sigmas.numpy(), atol=1e-6) and plan.initial_scale(levels[0]) == 1


def test_edm_is_diffusers_edm_with_its_preconditioning() -> None:
    """Their F is our v with its sign turned, on data divided by sigma_data."""
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(15)
    schedule = EDM()
    levels = knots(schedule, 15, spacing="karras", within="whole")
    assert np.allclose(schedule.time(levels[:-1]), theirs.timesteps.numpy(), atol=1e-5)
    denoise = guided(Denoiser(lambda x, t, c: -model(x, t, c), schedule, Prediction("v")), Condition())
    sigma = float(theirs.sigmas[0])
    u = sigma * latents(torch.float64)
    x = u / math.hypot(sigma, 0.5)
    for t, step in zip(theirs.timesteps, ddim(denoise, x, levels, schedule.marginal), strict=True):
        out = model(theirs.scale_model_input(u, t), t.double().expand(2), None)
        u = theirs.step(out, t, u).prev_sample.double()
        alpha = schedule.marginal(step.logsnr)[0]
        assert float((0.5 * step.x / alpha - u).abs().max()) < 1e-5 * max(1.0, float(u.abs().max()))


def test_predictor_corrector_is_diffusers_score_sde_ve(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusers.ScoreSdeVeScheduler(snr=0.16)
    theirs.set_timesteps(20)
    theirs.set_sigmas(20, 0.01, 50.0)
    sigmas, tape = theirs.discrete_sigmas.double(), Tape()
    object.__setattr__(tape, "seeds", (0,))
    source = "diffusers.schedulers.scheduling_sde_ve.randn_tensor"
    monkeypatch.setattr(source, lambda shape, **_: tape.step(0, u))

    def denoise(x: torch.Tensor, logsnr: float) -> torch.Tensor:
        return 0.6 * torch.tanh(x)

    start = 50 * latents(torch.float64)[:1]  # a batch of one: theirs averages norms over the batch
    levels = np.append(-2 * np.log(sigmas.flip(0).numpy()), 40.0)
    noise = Tape()
    walk = SAMPLERS["predictor-corrector"](denoise, start, levels, VE().marginal, noise, snr=0.16)
    u = start
    for index, step in zip(range(19, -1, -1), walk, strict=True):
        sigma = sigmas[index]
        u = theirs.step_correct((denoise(u, 0.0) - u) / sigma**2, u).prev_sample
        moved = theirs.step_pred((denoise(u, 0.0) - u) / sigma**2, (index + 0.5) / 19, u)
        u = moved.prev_sample if index else moved.prev_sample_mean
        assert float((step.x - u).abs().max()) < 1e-5 * max(1.0, float(u.abs().max()))


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_sde_is_diffusers_with_the_same_noise(karras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))  # only its noise, which is replaced
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    tape = Tape()
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda x, *_: lambda *_: tape.step(0, x))
    theirs = module.DPMSolverSDEScheduler(**SD, timestep_spacing="trailing", use_karras_sigmas=karras)
    plan = plan_of(theirs)
    states = walked(theirs, 12, torch.float64, None)
    states = states[1::2] + states[-1:]
    for level, x, y in zip(plan.knots(12)[1:], states, ours(plan, 12, torch.float64), strict=True):
        expected = plan.schedule.marginal(level)[0] * x
        assert float((expected - y).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_part_of_the_way_is_diffusers_strength() -> None:
    plan = plan_of(scheduler("DDIMScheduler", clip_sample=False))
    assert np.array_equal(plan.knots(50, start=0.6), plan.knots(50)[20:])


def test_one_schedulers_config_read_as_anothers_gives_the_plan_diffusers_would() -> None:
    """As `OtherScheduler.from_config(scheduler.config)`: the keys of one kind of solver mean the default of another."""
    unipc = scheduler("UniPCMultistepScheduler", solver_type="bh1", final_sigmas_type="sigma_min")
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        for options in ({}, {"solver_type": "heun"}, {"solver_type": "logrho"}):
            theirs = getattr(diffusers, name).from_config(dict(unipc.config) | (options if "DEIS" not in name else {}))
            plan = from_config(dict(unipc.config) | options | {"_class_name": name})
            reference = walked(theirs, 8, torch.float64, None)[-1]
            assert float((ours(plan, 8, torch.float64)[-1] - reference).abs().max()) < 1e-4


def test_one_step_of_plms_is_one_evaluation_as_in_diffusers() -> None:
    theirs, seen = scheduler("PNDMScheduler", skip_prk_steps=True, steps_offset=1), list[torch.Tensor]()
    plan = plan_of(theirs)
    theirs.set_timesteps(1)

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        seen.append(time)
        return model(x, time, condition)

    x = latents(torch.float64)
    denoise = guided(Denoiser(network, plan.schedule, plan.prediction), Condition())
    (step,) = SAMPLERS["plms"](denoise, x, plan.knots(1), plan.schedule.marginal, None, **plan.options)
    (t,) = theirs.timesteps
    expected = theirs.step(model(x, t.double().expand(2), None), t, x).prev_sample
    assert len(seen) == 1 and float((step.x - expected).abs().max()) < 1e-5


def test_a_flow_without_its_scheduler_and_a_spacing_of_levels_are_refused() -> None:
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "DDIMScheduler"):
        with pytest.raises(InputError, match="it takes a FlowMatchEulerDiscreteScheduler"):
            from_config({**SD, "_class_name": name, "prediction_type": "flow_prediction"})
        with pytest.raises(InputError, match="timestep_spacing 'karras' is not known; it can be one of: trailing"):
            from_config({**SD, "_class_name": name, "timestep_spacing": "karras"})


def test_times_of_a_flow_are_those_of_diffusers() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(timesteps=[999.0, 800.0, 500.0, 200.0])
    plan = plan_of(theirs)
    levels = plan.knots(4, spacing=[999, 800, 500, 200])
    assert np.allclose([plan.schedule.marginal(level)[1] for level in levels], theirs.sigmas.numpy(), atol=1e-6)
    assert np.allclose(plan.schedule.time(levels[:-1]), theirs.timesteps.numpy())


def test_a_config_with_no_counterpart_is_refused_by_name() -> None:
    for config in (
        {"_class_name": "KarrasVeScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
        {"_class_name": "DDIMScheduler", "beta_schedule": "exp"},
        {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True},
    ):
        with pytest.raises(InputError):
            from_config(config)
