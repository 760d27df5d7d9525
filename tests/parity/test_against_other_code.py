"""What has a second implementation besides diffusers' pipelines: its guiders, improved diffusion's bound; and the walks
where diffusers' own times or steps are off, which ours meet once those are put right."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from latentgen.diffusion.denoiser import Condition, Denoiser
from latentgen.diffusion.guidance import AnnealedCondition, Projection, guided
from latentgen.diffusion.likelihood import step_divergence
from latentgen.diffusion.loss import hybrid_loss
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule import Discrete
from latentgen.diffusion.schedule.discrete import linear_betas
from tests.parity.test_schedulers import deviation, latents, ours, plan_of, scheduler, walked

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("eta", "norm", "momentum"), [(0.0, None, 0.0), (0.5, 3.0, 0.0), (0.0, 2.5, -0.5)])
def test_projected_guidance_is_diffusers_step_after_step(eta: float, norm: float | None, momentum: float) -> None:
    schedule = Discrete.scaled_linear()

    def network(x: Any, time: Any, condition: Condition) -> Any:
        assert condition.labels is not None
        return torch.tanh(x * (1 + condition.labels.reshape(-1, 1, 1, 1))) + time.reshape(-1, 1, 1, 1) / 1000

    denoiser, x = Denoiser(network, schedule, Prediction("x0")), latents(torch.float64)
    told, untold = (Condition(labels=torch.full((2,), value, dtype=torch.float64)) for value in (1.0, 0.0))
    denoise = guided(denoiser, told, untold, scale=4.0, projection=Projection(eta, norm, momentum))
    for _ in range(2):  # a second walk remembers nothing of the first
        buffer = MomentumBuffer(momentum)
        for level in (-3.0, -1.0, -1.0, 2.0):
            c, u = denoiser(x, level, told), denoiser(x, level, untold)
            # diffusers adds scale times the update to the unconditional estimate, the paper scale − 1 to c
            theirs = normalized_guidance(c, u, 3.0, buffer, eta, norm or 0.0, use_original_formulation=True)
            assert torch.allclose(denoise(x, level), theirs, atol=1e-9)


def test_annealed_conditions_are_the_papers_formula_for_the_same_noise() -> None:
    """Sadat et al. 2024, algorithm 1, written out."""
    schedule = Discrete.scaled_linear()
    states = 2 + 3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = schedule.logsnr(0.7)
    told = {"low": 0.6, "high": 0.9}
    fresh = AnnealedCondition(Noise([4, 5]), schedule, **told, scale=1e6, mixing=0.0)(Condition(states), level).states
    gamma = (0.9 - 0.7) / 0.3
    assert fresh is not None
    n = (fresh - math.sqrt(gamma) * states) / (1e6 * math.sqrt(1 - gamma))
    assert abs(float(n.mean())) < 0.5 and 0.7 < float(n.std()) < 1.3
    for scale, mixing in ((0.1, 1.0), (0.25, 0.4)):
        noised = math.sqrt(gamma) * states + scale * math.sqrt(1 - gamma) * n
        std, mean = (getattr(noised, name)((1, 2), keepdim=True) for name in ("std", "mean"))
        own, centre = states.std((1, 2), keepdim=True), states.mean((1, 2), keepdim=True)
        expected = mixing * ((noised - mean) / std * own + centre) + (1 - mixing) * noised
        found = AnnealedCondition(Noise([4, 5]), schedule, **told, scale=scale, mixing=mixing)
        assert torch.allclose(found(Condition(states), level).states, expected, atol=1e-4)


@pytest.mark.parametrize("index", [1, 20, 500, 999])
def test_the_hybrid_loss_is_improved_diffusions_from_its_betas(index: int) -> None:
    """Nichol & Dhariwal 2021, eq. 10 to 16, from the betas themselves and with their interpolated log variance."""
    betas = linear_betas().astype(np.float64)
    bars = np.cumprod(1 - betas)
    table = Discrete(tuple(bars.tolist()))
    generator = torch.Generator().manual_seed(0)
    x0, eps, out, v = (torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    v = torch.tanh(v)
    bar, bar_before, beta = bars[index], bars[index - 1], betas[index]
    x = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * eps
    guess = (x - math.sqrt(1 - bar) * out) / math.sqrt(bar)
    tilde = beta * (1 - bar_before) / (1 - bar)
    first = beta * math.sqrt(bar_before) / (1 - bar)
    second = (1 - bar_before) * math.sqrt(1 - beta) / (1 - bar)
    share = (v + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(tilde)
    p = torch.distributions.Normal(first * guess + second * x, torch.exp(0.5 * log_variance))
    q = torch.distributions.Normal(first * x0 + second * x, math.sqrt(tilde))
    nats = torch.distributions.kl_divergence(q, p)
    now, later = (torch.full((3,), float(table.levels[i]), dtype=torch.float64) for i in (index, index - 1))
    told = (x0, guess, x, now, later, table.marginal)
    assert torch.allclose(step_divergence(*told, variance="learned-range", v=v), nats.sum((1, 2, 3)), rtol=1e-6)
    network = lambda x, time, c: torch.cat([out, v], dim=1)  # noqa: E731
    loss = hybrid_loss(network, table, Prediction("eps"), x0, Condition(), now, later, eps, weight=0.3)
    expected = (out - eps).square().mean((1, 2, 3)) + 0.3 * nats.mean((1, 2, 3))
    assert torch.allclose(loss, expected, rtol=1e-6)


MULTISTEP = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("steps", [7, 20])
def test_exponential_levels_are_diffusers_and_the_walk_too_where_its_first_time_is_not_cut(
    name: str, steps: int
) -> None:
    """diffusers cuts the noisiest level's 998.99… to 998; it is 999, and with that told the two walks are one."""
    theirs = scheduler(name, use_exponential_sigmas=True)
    theirs.set_timesteps(steps)
    plan = plan_of(theirs)
    levels = plan.knots(steps)
    sigmas = np.exp(-0.5 * levels[:-1])
    assert np.allclose(sigmas, theirs.sigmas[:-1].numpy(), rtol=2e-5)
    times = np.array([plan.schedule.time(level) for level in levels[:-1]])
    found = theirs.timesteps.numpy()
    assert found[0] == 998 and times[0] == 999 and np.array_equal(times[1:], found[1:])
    told, cut = theirs.set_timesteps, theirs.timesteps.clone()
    cut[0] = 999

    def put_right(steps: int) -> None:
        told(steps)
        theirs.timesteps = cut

    theirs.set_timesteps = put_right
    assert deviation(theirs, steps, torch.float64) < 1e-5


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 30), ("trailing", 14), ("linspace", 30)])
def test_plms_is_diffusers_where_its_steps_are_made_to_meet(spacing: str, steps: int) -> None:
    """diffusers steps to t − N//steps, whatever the next t is; sent to the next t its walk is ours."""
    theirs = scheduler("PNDMScheduler", skip_prk_steps=True, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    times = [int(t) for t in theirs._timesteps[::-1]] + [-1]
    own, calls = theirs._get_prev_sample, itertools.count()

    def met(sample: Any, timestep: int, prev_timestep: int, out: Any) -> Any:
        place = max(next(calls) - 1, 0)  # the first step takes two
        return own(sample, times[place], times[place + 1], out)

    theirs._get_prev_sample = met
    reference = walked(theirs, steps, torch.float64, None)[1:]
    found = ours(plan_of(theirs), steps, torch.float64)
    scale = max(float(x.abs().max()) for x in reference)
    assert max(float((x - y).abs().max()) for x, y in zip(reference, found, strict=True)) < 1e-5 * scale


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    "name", [*MULTISTEP, "HeunDiscreteScheduler", "LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_every_other_sampler_on_every_beta_table(name: str, betas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = monkeypatch if "Ancestral" in name else None
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        assert deviation(scheduler(name, beta_schedule=betas), 20, dtype, patched) < bound


def test_ddpms_sigmoid_betas_are_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = scheduler("DDPMScheduler", beta_schedule="sigmoid", clip_sample=False)
    assert deviation(theirs, 20, torch.float64, monkeypatch) < 1e-5


def test_numpy_and_torch_walk_alike() -> None:
    """Every sampler, noise included: the state's library changes nothing but rounding."""
    plan = plan_of(scheduler("DPMSolverMultistepScheduler"))
    levels, start = plan.knots(8), Noise([1, 2]).initial((3, 4, 4)).astype(np.float64)

    def denoise(x: Any, logsnr: float) -> Any:
        return 0.5 * x / (1 + math.exp(-0.1 * logsnr)) + 0.1

    for name, sampler in SAMPLERS.items():
        ends = []
        for x in (start, torch.from_numpy(start)):
            *_, end = sampler(denoise, x, levels, plan.schedule.marginal, Noise([1, 2]))
            ends.append(np.asarray(end.x))
        assert np.allclose(ends[0], ends[1], rtol=1e-12, atol=1e-12), name
