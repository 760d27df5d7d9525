"""Every sampler, one shape: (denoise, x, knots, marginal, noise, *, …) -> an iterator of Step."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from latentgen.diffusion.array import Array, namespace
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling.adaptive import probability_flow
from latentgen.diffusion.sampling.ancestral import ddim, ddim_inversion, ddpm, euler, euler_ancestral, lcm
from latentgen.diffusion.sampling.langevin import annealed_langevin, predictor_corrector
from latentgen.diffusion.sampling.multistep import deis, lms, plms, pndm, unipc
from latentgen.diffusion.sampling.ode import dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, heun
from latentgen.diffusion.sampling.table import TABLE, SamplerNote
from latentgen.diffusion.sampling.walk import Denoise, Leg, Marginal, Step, legs

Sampler = Callable[..., Iterator[Step]]

SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": ddim,
        "ddpm": ddpm,
        "euler": euler,
        "euler-ancestral": euler_ancestral,
        "heun": heun,
        "dpmpp-2m": dpmpp_2m,
        "dpmpp-2m-sde": dpmpp_2m_sde,
        "dpmpp-sde": dpmpp_sde,
        "unipc": unipc,
        "deis": deis,
        "lms": lms,
        "plms": plms,
        "pndm": pndm,
        "lcm": lcm,
        "langevin": annealed_langevin,
        "predictor-corrector": predictor_corrector,
        "probability-flow": probability_flow,
    }
)

# They choose their steps by what they see, and between two of them the state is their own: a callback cannot reach it.
OWN_STEPS = frozenset({"probability-flow"})


def walked(
    sampler: str,
    denoise: Callable[[slice], Denoise],
    x: Array,
    knots: np.ndarray,
    marginal: Marginal,
    noise: Noise,
    **options: Any,
) -> Iterator[Step]:
    """The steps of a sampler by name, x (B, …) being of the whole batch in each; `denoise` is told which rows it is of.

    One of OWN_STEPS walks the rows one after the other, so that no picture depends on its neighbours.
    """
    walk, whole = SAMPLERS[sampler], slice(0, len(x))
    if sampler not in OWN_STEPS or len(x) == 1:
        yield from walk(denoise(whole), x, knots, marginal, noise, **options)
        return
    index, xp = 0, namespace(x)
    for row in range(len(x)):
        part = slice(row, row + 1)
        for step in walk(denoise(part), x[part], knots, marginal, noise, **options):
            x = xp.concat((x[:row], step.x, x[row + 1 :]), axis=0)
            yield Step(index, x, xp.concat((x[:row], step.x0, x[row + 1 :]), axis=0), step.logsnr)
            index += 1


__all__ = [
    "OWN_STEPS",
    "SAMPLERS",
    "TABLE",
    "Denoise",
    "Leg",
    "Marginal",
    "Sampler",
    "SamplerNote",
    "Step",
    "annealed_langevin",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "lcm",
    "legs",
    "lms",
    "plms",
    "pndm",
    "predictor_corrector",
    "probability_flow",
    "unipc",
    "walked",
]
