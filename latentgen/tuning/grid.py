"""What is tried: samplers, guidance scales, intervals and averages, each at as many steps as the budget pays for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from latentgen.diffusion.guidance import between
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.errors import InputError

TRIED = ("dpmpp-2m", "unipc", "deis", "ddim", "heun", "euler-ancestral", "dpmpp-2m-sde")
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0)
INTERVALS = (None, (0.0, 0.6), (0.2, 0.8))  # parts of the way from noise to clean
FEWEST = 2  # steps; with fewer no sampler here is itself


@dataclass(frozen=True)
class Candidate:
    """One way to render. evaluations: rows the network is given for each picture. width: of the weights' average."""

    sampler: str
    steps: int
    guidance: float
    interval: tuple[float, float] | None
    evaluations: int
    width: float | None = None

    def settings(self) -> dict[str, Any]:
        """As `Pipeline.__call__` names them; the whole of the way is said, lest a default interval be taken."""
        told: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return told | {"sampler": self.sampler, "guidance_interval": self.interval or (0.0, 1.0)}

    def words(self) -> str:
        """For people."""
        part = "" if self.interval is None else f" in {self.interval[0]:g} to {self.interval[1]:g}"
        average = "" if self.width is None else f", average {self.width:g}"
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}{part}{average}"


def grid(
    scheduler: Mapping[str, Any],
    budget: int,
    *,
    samplers: Sequence[str] = TRIED,
    guidances: Sequence[float] = GUIDANCES,
    intervals: Sequence[tuple[float, float] | None] = INTERVALS,
    widths: Sequence[float | None] = (None,),
) -> list[Candidate]:
    """Every combination with the most steps that cost `budget` evaluations a picture or less.

    scheduler: a diffusers scheduler config. Raises InputError where no sampler fits, with the least that would.
    """
    if "probability-flow" in samplers:
        raise InputError("--samplers has probability-flow, whose price differs from picture to picture; leave it out")
    found, least = [], []
    for sampler in samplers:
        for guidance in guidances:
            for interval in intervals if guidance > 1 else (None,):
                least.append(evaluations(scheduler, sampler, FEWEST, guidance, interval))
                told = most_steps(scheduler, sampler, budget, guidance, interval)
                if told is not None:
                    found += [Candidate(sampler, told[0], guidance, interval, told[1], width) for width in widths]
    if not found:
        raise InputError(
            f"--evaluations is {budget}, in which no sampler takes {FEWEST} steps; the least that fits is {min(least)}"
        )
    return found


def most_steps(
    scheduler: Mapping[str, Any], sampler: str, budget: int, guidance: float, interval: tuple[float, float] | None
) -> tuple[int, int] | None:
    """(steps, evaluations) with the most steps within the budget, None where fewer than `FEWEST` fit."""
    for steps in range(budget, FEWEST - 1, -1):
        cost = evaluations(scheduler, sampler, steps, guidance, interval)
        if cost <= budget:
            return steps, cost
    return None


def evaluations(
    scheduler: Mapping[str, Any], sampler: str, steps: int, guidance: float, interval: tuple[float, float] | None
) -> int:
    """How many rows the network is given for one picture: two where guidance acts, else one."""
    knots, asked = levels(json.dumps(dict(scheduler), sort_keys=True), sampler, steps)
    if guidance <= 1:
        return len(asked)
    if interval is None:
        return 2 * len(asked)
    low, high = between(interval, knots)
    return len(asked) + sum(low <= logsnr <= high for logsnr in asked)


@cache
def levels(scheduler: str, sampler: str, steps: int) -> tuple[list[float], list[float]]:
    """The knots, and every logSNR at which the sampler asks: it is walked on a state of one number.

    scheduler: the config as JSON.
    """
    plan = plan_for(json.loads(scheduler), sampler)
    knots = plan.knots(steps)
    asked = []

    def denoise(x: np.ndarray, logsnr: float) -> Any:
        asked.append(float(logsnr))
        return (0 * x, 0 * x) if plan.options.get("variance") == "learned-range" else 0 * x

    state = np.zeros((1, 1, 1, 1))
    for _ in SAMPLERS[plan.sampler](denoise, state, knots, plan.schedule.marginal, Noise([0]), **plan.options):
        pass
    return [float(knot) for knot in knots], asked
