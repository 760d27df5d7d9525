"""Rectified flow in latents, as a recipe's keys: its target, its samplers, and a run from the data to pictures."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen import InputError
from latentgen.build import scheduler_config, train
from latentgen.checkpoint import save_pipeline
from latentgen.continuation import train_on
from latentgen.diffusion.denoiser import Condition, Denoiser
from latentgen.diffusion.guidance import guided
from latentgen.diffusion.loss import denoising_loss
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule import from_config
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.pipeline import Pipeline
from latentgen.recipe import read_recipe

TINY = Path(__file__).parent / "data" / "tiny.toml"


def flowing(folder: Path) -> Path:
    """The tiny recipe as a flow, short."""
    text = TINY.read_text().replace("head_width = 32", 'head_width = 32\nschedule = "flow"\nprediction = "flow"')
    text = text.replace('prediction = "flow"', 'prediction = "flow"\ntimes = "logit-normal"')
    text = text.replace("steps = 12", "steps = 4").replace("steps = 16", "steps = 4").replace("batch = 32", "batch = 8")
    (folder / "flow.toml").write_text(text)
    return folder / "flow.toml"


class Perfect:
    """What a network that knows the one picture there is puts out: dx/ds = eps − x0, from x and 1000·s alone."""

    def __init__(self, x0: torch.Tensor) -> None:
        self.x0 = x0

    def __call__(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        s = (torch.as_tensor(time).to(x) / 1000).reshape(-1, 1, 1, 1)
        return (x - (1 - s) * self.x0) / s - self.x0


def test_a_perfect_network_has_no_loss_and_every_step_is_the_picture(tmp_path: Path) -> None:
    plan = from_config(scheduler_config(read_recipe(flowing(tmp_path))))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    eps = torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64)
    network, times = Perfect(x0), torch.tensor([0.05, 0.3, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    of_five = x0.expand(5, -1, -1, -1)
    loss = denoising_loss(network, plan.schedule, plan.prediction, of_five, Condition(), times, eps)
    assert float(loss.abs().max()) < 1e-9
    denoiser = Denoiser(network, plan.schedule, plan.prediction)
    for s in times.tolist():
        logsnr = float(plan.schedule.logsnr(s))
        assert 2 * np.log((1 - s) / s) == pytest.approx(logsnr, rel=1e-6)
        found = denoiser((1 - s) * x0 + s * eps[:1], logsnr, Condition())
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "ddim", "unipc", "heun"])
def test_a_sampler_walks_a_flow_as_it_walks_the_others(sampler: str, tmp_path: Path) -> None:
    plan = plan_for(scheduler_config(read_recipe(flowing(tmp_path))), sampler)
    assert (plan.sampler, plan.prediction.name) == (sampler, "flow")
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    denoise = guided(Denoiser(Perfect(x0), plan.schedule, plan.prediction), Condition())
    *_, last = SAMPLERS[sampler](denoise, x, plan.knots(6), plan.schedule.marginal, None)
    torch.testing.assert_close(last.x, x0, rtol=0, atol=1e-5)


def exact(schedule: Any, x: Any, logsnr: float) -> Any:
    """E[x0 | x] of data N(0.3, 0.5²), which is what a perfect network of more than one picture knows."""
    alpha, sigma = schedule.marginal(logsnr)
    return 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"langevin", "lcm"}))
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_sampler_draws_the_data_along_a_flow(sampler: str, shift: float) -> None:
    plan = plan_for({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}, sampler)
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(2))
    denoise = partial(exact, plan.schedule)
    *_, last = SAMPLERS[sampler](denoise, x, plan.knots(80), plan.schedule.marginal, Noise([0]), **plan.options)
    assert float(last.x.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(last.x.std()) == pytest.approx(0.5, abs=0.06)


def test_ten_steps_along_a_flow_end_where_those_of_diffusers_solver_end() -> None:
    from diffusers import DPMSolverMultistepScheduler

    plan = plan_for({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "dpmpp-2m")
    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    theirs.set_timesteps(10)
    start = torch.randn(1, 4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    *_, ours = SAMPLERS["dpmpp-2m"](partial(exact, plan.schedule), start, plan.knots(10), plan.schedule.marginal, None)
    x = start
    for t, s in zip(theirs.timesteps, theirs.sigmas.tolist(), strict=False):
        x = theirs.step((x - exact(plan.schedule, x, 2 * np.log((1 - s) / s))) / s, t, x).prev_sample
    assert float((ours.x - x).abs().max()) < 0.02  # theirs starts at 0.999 and has steps of 0.0999
    assert float(ours.x.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_a_flow_trains_and_renders_by_its_prompts(tmp_path: Path) -> None:
    recipe = flowing(tmp_path)
    folder = train(recipe, tmp_path / "out", report=lambda line: None)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert np.isfinite(json.loads((folder / "metrics.json").read_text())["unet"]["validation_loss"])
    pipe = Pipeline.from_pretrained(folder)
    for sampler in ("dpmpp-2m", "euler"):
        prompts = ["a red apple, noto emoji style", "a cat, noto emoji style"]
        call = {"seed": [3, 3], "sampler": sampler, "guidance_scale": 8.0, "output_type": "np"}
        one, other = np.asarray(pipe(prompts, **call).images)  # type: ignore[arg-type]
        assert np.isfinite(one).all() and np.isfinite(other).all() and one.shape == (32, 32, 3)
        assert np.abs(one - other).max() > 0
    with pytest.raises(InputError, match=r"the recipe (predicts v|says).*write the same"):
        train_on(TINY, folder, tmp_path / "more", report=lambda line: None)


def test_stock_diffusers_renders_it_by_a_solver_that_knows_flows(parts: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

    config = scheduler_config(read_recipe(flowing(tmp_path)))
    folder = save_pipeline(tmp_path / "weights", **parts, scheduler_config=config)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(stock.scheduler, FlowMatchEulerDiscreteScheduler)  # which that pipeline itself cannot walk
    stock.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    stock.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    call = {"num_inference_steps": 60, "guidance_scale": 2.0, "output_type": "np"}
    prompt, size = "a red apple on a white table", {"height": 32, "width": 32}
    theirs = stock(prompt, latents=torch.from_numpy(latents), **call, **size).images[0]
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    ours = np.asarray(pipe(prompt, latents=latents, seed=0, sampler="dpmpp-2m", **call).images)[0]
    other = np.asarray(pipe("a blue bird", latents=latents, seed=0, sampler="dpmpp-2m", **call).images)[0]
    apart, told = np.abs(ours - theirs).mean(), np.abs(ours - other).mean()
    assert apart < 5e-3 and apart < told / 3, (apart, told)  # two paths of steps to one solution
