"""Every sampler, one shape: (denoise, x, knots, marginal, noise, *, …) -> an iterator of Step."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from latentgen.diffusion.sampling.ancestral import ddim, ddpm, euler, euler_ancestral
from latentgen.diffusion.sampling.ode import dpmpp_2m, heun
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
    }
)

__all__ = [
    "SAMPLERS",
    "Denoise",
    "Leg",
    "Marginal",
    "Sampler",
    "Step",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "heun",
    "legs",
]
