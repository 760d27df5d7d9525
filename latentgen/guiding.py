"""A request's guidance: the denoiser with its conditions and all that steers it."""

from dataclasses import replace
from typing import Any

import numpy as np

from latentgen.diffusion.denoiser import Condition, Denoise, Denoiser, Network
from latentgen.diffusion.guidance import AnnealedCondition, Projection, guided
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.schedule.plan import Plan
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.errors import InputError
from latentgen.models.memory import in_groups
from latentgen.request import Request


def guided_as(
    request: Request,
    plan: Plan,
    knots: np.ndarray,
    denoiser: Denoiser,
    conditions: tuple[Condition, Condition | None],
    rows: int,
    noise: Any,
    perturbed: Network | None,
    snapshot: tuple[Denoiser | None, float],
) -> Denoise:
    """The denoiser with every kind of guidance that was asked for.

    conditions: the prompt's, and the one to be guided away from. rows: of an evaluation. perturbed: the network whose
    attention can be perturbed, where the engine has one. snapshot: the weaker denoiser and its scale.
    """
    if request.pag and perturbed is None:
        raise InputError("pag_scale needs a network whose attention can be perturbed, which this engine's cannot")
    other = None if perturbed is None else replace(denoiser, network=in_groups(perturbed, rows))
    interval = None
    if request.interval is not None:
        first, last = (round(part * request.steps) for part in request.interval)
        interval = (float(knots[first]), float(knots[max(first, last - 1)]))
    return guided(
        denoiser,
        *conditions,
        scale=request.scale,
        rescale=request.rescale,
        interval=interval,
        projection=None if request.projection is None else Projection(*request.projection),
        annealed=_annealed(request, plan, noise),
        weaker=snapshot[0],
        weaker_scale=snapshot[1],
        perturbed=other,
        perturbed_scale=request.pag,
        clip=plan.clip,
        threshold=plan.threshold,
        threshold_max=plan.threshold_max,
        variance=plan.options.get("variance") == "learned-range",
    )


def _annealed(request: Request, plan: Plan, noise: Any) -> AnnealedCondition | None:
    """CADS, where it was asked for; its noise is of the pictures' own seeds."""
    if request.annealing is None:
        return None
    if not isinstance(noise, Noise):
        raise InputError("condition_annealing draws its noise from seeds; give a seed instead of a generator")
    low, high, scale = request.annealing
    return AnnealedCondition(noise, plan.schedule, low, high, scale)


def snapshot_of(weaker: Any, pipe: Any, rows: int) -> Denoiser:
    """The denoiser of a weaker pipeline, whose latents, text states and arrays must be of the kind of `pipe`'s."""
    if not isinstance(weaker, type(pipe)):
        raise InputError(
            f"weaker is a {type(weaker).__name__}; it must be a Pipeline of an earlier or smaller snapshot"
        )
    unlike = [
        f"{name} is {theirs}, here {ours}"
        for name, theirs, ours in (
            ("latent channels", weaker.terms.channels, pipe.terms.channels),
            ("latent factor", weaker.terms.factor, pipe.terms.factor),
            ("width of the text", *(p.terms.configs[0].get("cross_attention_dim") for p in (weaker, pipe))),
            ("engine", *((p.machine or {}).get("engine", "torch") for p in (weaker, pipe))),
        )
        if theirs != ours
    ]
    if unlike:
        raise InputError(f"weaker is no snapshot of this model: its {unlike[0]}; give an earlier or smaller one")
    plan = plan_for(weaker.scheduler, pipe.terms.sampler)
    return Denoiser(in_groups(weaker.network, rows), plan.schedule, plan.prediction)
