"""Schedules: logSNR(t) and its inverse, the frames, the knots, and what a diffusers scheduler config says of them."""

from latentgen.diffusion.schedule.continuous import (
    EDM,
    VE,
    Cosine,
    Learned,
    Linear,
    RectifiedFlow,
    SubVP,
    UniformLogsnr,
)
from latentgen.diffusion.schedule.discrete import Discrete
from latentgen.diffusion.schedule.knots import SPACINGS, knots
from latentgen.diffusion.schedule.plan import Plan, from_config
from latentgen.diffusion.schedule.protocol import (
    LOGSNR_MAX,
    LOGSNR_MIN,
    Schedule,
    straight_line,
    variance_exploding,
    variance_preserving,
)

__all__ = [
    "EDM",
    "LOGSNR_MAX",
    "LOGSNR_MIN",
    "SPACINGS",
    "VE",
    "Cosine",
    "Discrete",
    "Learned",
    "Linear",
    "Plan",
    "RectifiedFlow",
    "Schedule",
    "SubVP",
    "UniformLogsnr",
    "from_config",
    "knots",
    "straight_line",
    "variance_exploding",
    "variance_preserving",
]
