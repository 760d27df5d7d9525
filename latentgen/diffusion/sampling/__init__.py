"""Every sampler, one shape: (denoise, x, knots, marginal, noise, *, …) -> an iterator of Step."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

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

__all__ = [
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
]
