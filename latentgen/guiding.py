"""A request's guidance: the denoiser with its conditions, and all that steers it on its way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

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
from latentgen.values import check_array, kind


@dataclass(eq=False)
class Walk:
    """A call of a pipeline that is under way: whose thread it is, and whether it is to end after its step."""

    thread: int = field(default_factory=get_ident)
    interrupted: bool = False


_WALKS: "WeakKeyDictionary[Any, list[Walk]]" = WeakKeyDictionary()  # of each pipeline; a copy has its own


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
    walk: Walk,
    plan: Plan,
    denoise: Callable[[slice], Denoise],
    x: Array,
    knots: np.ndarray,
    noise: Any,
    callback: Callable[[Any, int, float, dict[str, Array]], dict[str, Array] | None] | None,
) -> tuple[Array, bool]:
    """From noise to clean latents, (B, C, h, w) both; the callback is told of each step, and may steer.

    pipe: what the callback is told first. walk: this one, which ends where it is interrupted. Returned besides: whether
    it was another one than without either.
    """
    logsnr, turned = (start := float(knots[0])), False
    for step in walked(plan.sampler, denoise, x, knots, plan.schedule.marginal, noise, **plan.options):
        if callback is not None:
            logsnr = start if step.logsnr < logsnr else logsnr  # of OWN_STEPS the next row
            time = float(plan.schedule.time(logsnr))  # the one the step was walked from
            shown = step.x + 0  # the callback's own, to be written into at will
            other = _put_in_place(step.x, _told(callback(pipe, step.index, time, {"latents": shown}), shown))
            turned |= other
            if other and plan.sampler in OWN_STEPS:
                raise InputError(f"sampler {plan.sampler!r} cannot go on from other latents; use ddim or heun")
        x, logsnr = step.x, step.logsnr
        if walk.interrupted:
            return x, True
    return x, turned


def _told(returned: Any, shown: Array) -> Array:
    """The latents that a callback returned; those it was shown where it returned none."""
    if returned is None or returned is False:  # as of a lambda that ends in a comparison
        return shown
    if not isinstance(returned, Mapping) or not returned.keys() <= {"latents"}:
        said = f"a mapping of {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else kind(returned)
        raise InputError(f"callback_on_step_end returned {said}; it must return None or {{'latents': array}}")
    latents = returned.get("latents", shown)
    check_array("what callback_on_step_end returned as latents", latents)
    return latents


def _put_in_place(x: Any, other: Any) -> bool:
    """Make `x` hold what a callback returned, as the sampler goes on from the array it yielded; whether it differs."""
    if tuple(other.shape) != tuple(x.shape):
        raise InputError(f"the callback returned latents of shape {tuple(other.shape)}; it must be {tuple(x.shape)}")
    value = like(other, x)
    differs = bool((value != x).any())
    x[...] = value
    return differs


@contextmanager
def under_way(pipe: Any) -> Iterator[Walk]:
    """A call of a pipeline, inside which `walks_of` knows of it."""
    walk, walks = Walk(), _WALKS.setdefault(pipe, [])
    walks.append(walk)
    try:
        yield walk
    finally:
        walks.remove(walk)


def walks_of(pipe: Any) -> Sequence[Walk]:
    """Those calls of a pipeline that this thread speaks of: its own innermost one, or else all that are under way."""
    walks = list(_WALKS.get(pipe, ()))
    return [walk for walk in walks if walk.thread == get_ident()][-1:] or walks


def engine_of(pipe: Any) -> str:
    """Which engine computes; of a pipeline from parts it is torch."""
    return str((pipe.machine or {}).get("engine", "torch"))


def computing(pipe: Any) -> dict[str, Any]:
    """What of the machine the settings of a picture say: as it was opened, and torch's threads as they are now."""
    told = dict(pipe.machine or {})
    if told.get("engine") == "torch" and told.get("threads"):
        import torch

        told["threads"] = torch.get_num_threads()
    return told


def _way(pipe: Any) -> str:
    """The frame in which its latents are noised: x of one is not x of another."""
    return "a straight line" if plan_for(pipe.scheduler, "euler").prediction.name == "flow" else "variance preserving"


def check_weaker(weaker: Any, pipe: Any) -> None:
    """Raises InputError for a weaker pipeline whose latents or text states are of another kind than `pipe`'s."""
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
            ("way to noise", *(_way(p) for p in (weaker, pipe))),
        )
        if theirs != ours
    ]
    if unlike:
        raise InputError(f"weaker is no snapshot of this model: its {unlike[0]}; give an earlier or smaller one")


def snapshot_of(weaker: Any, pipe: Any, rows: int) -> Denoiser:
    """The denoiser of a weaker pipeline (`check_weaker`), whose arrays must be of the kind of `pipe`'s."""
    if engine_of(weaker) != engine_of(pipe):
        engines = f"its engine is {engine_of(weaker)}, here {engine_of(pipe)}"
        raise InputError(f"weaker is no snapshot that can be used here: {engines}; open both with one engine")
    plan = plan_for(weaker.scheduler, pipe.terms.sampler)
    return Denoiser(in_groups(weaker.network, rows), plan.schedule, plan.prediction)
