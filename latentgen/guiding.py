"""A request's guidance: the denoiser with its conditions, and all that steers it on its way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from latentgen.diffusion.array import Array, like
from latentgen.diffusion.denoiser import Condition, Denoise, Denoiser, Network
from latentgen.diffusion.guidance import AnnealedCondition, Projection, between, guided
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling import OWN_STEPS, walked
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
) -> Callable[[slice], Denoise]:
    """Some rows of the batch -> their denoiser, with every kind of guidance that was asked for.

    conditions: the prompt's, and the one to be guided away from. rows: of an evaluation. perturbed: the network whose
    attention can be perturbed, where the engine has one. snapshot: the weaker denoiser and its scale.
    """
    if request.pag and perturbed is None:
        raise InputError("pag_scale needs a network whose attention can be perturbed, which this engine's cannot")
    other = None if perturbed is None else replace(denoiser, network=in_groups(perturbed, rows))
    interval = None if request.interval is None else between(request.interval, knots)
    condition, negative = conditions
    return lambda part: guided(
        denoiser,
        condition.rows(part),
        None if negative is None else negative.rows(part),
        scale=request.scale,
        rescale=request.rescale,
        interval=interval,
        projection=None if request.projection is None else Projection(*request.projection),
        annealed=_annealed(request, plan, noise, part),
        weaker=snapshot[0],
        weaker_scale=snapshot[1],
        perturbed=other,
        perturbed_scale=request.pag,
        clip=plan.clip,
        threshold=plan.threshold,
        threshold_max=plan.threshold_max,
        variance=plan.options.get("variance") == "learned-range",
    )


def _annealed(request: Request, plan: Plan, noise: Any, part: slice) -> AnnealedCondition | None:
    """CADS, where it was asked for; its noise is of the pictures' own seeds."""
    if request.annealing is None:
        return None
    if not isinstance(noise, Noise):
        raise InputError("condition_annealing draws its noise from seeds; give a seed instead of a generator")
    low, high, scale = request.annealing
    return AnnealedCondition(Noise(noise.seeds[part]), plan.schedule, low, high, scale)


def steered(
    pipe: Any,
    plan: Plan,
    denoise: Callable[[slice], Denoise],
    x: Array,
    knots: np.ndarray,
    noise: Any,
    callback: Callable[[Any, int, float, dict[str, Array]], dict[str, Array] | None] | None,
) -> Array:
    """From noise to clean latents, (B, C, h, w) both; the callback is told of each step, and may steer.

    pipe: what the callback is told first; its `interrupt` ends the walk, its `_steered` is set where it was steered.
    """
    logsnr = start = float(knots[0])
    for step in walked(plan.sampler, denoise, x, knots, plan.schedule.marginal, noise, **plan.options):
        if callback is not None:
            logsnr = start if step.logsnr < logsnr else logsnr  # of OWN_STEPS the next row
            time = float(plan.schedule.time(logsnr))  # the one the step was walked from
            shown = step.x + 0  # the callback's own, to be written into at will
            told = (callback(pipe, step.index, time, {"latents": shown}) or {}).get("latents", shown)
            other = _put_in_place(step.x, told)
            pipe._steered |= pipe.interrupt or other
            if other and plan.sampler in OWN_STEPS:
                raise InputError(f"sampler {plan.sampler!r} cannot go on from other latents; use ddim or heun")
        x, logsnr = step.x, step.logsnr
        if pipe.interrupt:
            break
    return x


def _put_in_place(x: Any, other: Any) -> bool:
    """Make `x` hold what a callback returned, as the sampler goes on from the array it yielded; whether it differs."""
    if tuple(other.shape) != tuple(x.shape):
        raise InputError(f"the callback returned latents of shape {tuple(other.shape)}; it must be {tuple(x.shape)}")
    value = like(other, x)
    differs = bool((value != x).any())
    x[...] = value
    return differs


def engine_of(pipe: Any) -> str:
    """Which engine computes; of a pipeline from parts it is torch."""
    return str((pipe.machine or {}).get("engine", "torch"))


def _way(pipe: Any) -> str:
    """The frame in which its latents are noised: x of one is not x of another."""
    return "a straight line" if plan_for(pipe.scheduler, "euler").prediction.name == "flow" else "variance preserving"


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
            ("engine", engine_of(weaker), engine_of(pipe)),
            ("way to noise", *(_way(p) for p in (weaker, pipe))),
        )
        if theirs != ours
    ]
    if unlike:
        raise InputError(f"weaker is no snapshot of this model: its {unlike[0]}; give an earlier or smaller one")
    plan = plan_for(weaker.scheduler, pipe.terms.sampler)
    return Denoiser(in_groups(weaker.network, rows), plan.schedule, plan.prediction)
