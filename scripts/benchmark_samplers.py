"""What a sampler step costs beyond the network, and beside diffusers' scheduler for the same method.

    python scripts/benchmark_samplers.py [--steps 50] [--runs 15] [--batch 1]

Both sides get the same free network (a fixed eps, 4×64×64, float32, on the CPU), take the same steps in turn, and the
median over the runs is printed, in milliseconds a step; ratio is ours to theirs, evaluations how often a step asks the
network. Each draws its noise in its own way. diffusers' `lms` takes SciPy, its `dpmpp-sde` torchsde; where one is not
installed its line says so.
"""

import argparse
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from benchmark_process import guarded

from latentgen.diffusion.denoiser import Condition, Denoiser
from latentgen.diffusion.guidance import guided
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule import from_config
from latentgen.errors import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
    "dpmpp-sde": ("DPMSolverSDEScheduler", {}),
}
NEEDED = {"lms": "scipy", "dpmpp-sde": "torchsde"}  # diffusers integrates with it, or draws from its Brownian tree


def theirs(scheduler: Any, eps: torch.Tensor, steps: int) -> None:
    """diffusers' denoising loop without the network; the levels are set by every run, as its pipelines do."""
    scheduler.set_timesteps(steps)
    x = eps * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(0)
    noisy = "generator" in scheduler.step.__code__.co_varnames
    options = {"generator": generator} if noisy else {}
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(eps, t, x, **options).prev_sample


def ours(plan: Any, sampler: str, eps: torch.Tensor, steps: int) -> int:
    """The same loop here, knots and the prediction's 2×2 included; gives the number of evaluations."""
    asked = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        asked.append(t)
        return eps

    denoise = guided(Denoiser(network, plan.schedule, plan.prediction), Condition())
    levels, noise = plan.knots(steps), Noise(range(len(eps)))
    for _ in SAMPLERS[sampler](denoise, eps, levels, plan.schedule.marginal, noise, **plan.options):
        pass
    return len(asked)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    asked = parser.parse_args()
    if min(asked.steps, asked.runs, asked.batch) < 1:
        raise InputError("--steps, --runs and --batch must be 1 or more")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    eps = torch.randn(asked.batch, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    print(
        f"{'sampler':18}{'ours ms':>9}{'diffusers ms':>14}{'ratio':>8}{'evaluations':>13}"
        f"    ({asked.batch}×4×64×64, {asked.steps} steps)"
    )
    for sampler, (name, options) in METHODS.items():
        if sampler in NEEDED and importlib.util.find_spec(NEEDED[sampler]) is None:
            print(f"{sampler:18}left out: pip install {NEEDED[sampler]}, which diffusers' takes")
            continue
        scheduler = getattr(diffusers, name)(**SD, **options)
        plan = from_config(dict(scheduler.config) | {"_class_name": name})
        pairs = []
        with torch.inference_mode():
            evaluations = ours(plan, sampler, eps, asked.steps) / asked.steps
            for _ in range(asked.runs):
                pairs.append(
                    (
                        timed(lambda: ours(plan, sampler, eps, asked.steps)),  # noqa: B023
                        timed(lambda: theirs(scheduler, eps, asked.steps)),  # noqa: B023
                    )
                )
        mine, other = (1000 * sorted(column)[asked.runs // 2] / asked.steps for column in zip(*pairs, strict=True))
        print(f"{sampler:18}{mine:9.3f}{other:14.3f}{mine / other:8.2f}{evaluations:13.2f}")


if __name__ == "__main__":
    guarded(main)
