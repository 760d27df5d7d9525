"""Knots: the logSNR levels a sampler walks through, noisiest first, float64 on the host."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from latentgen.diffusion.schedule.continuous import RectifiedFlow
from latentgen.diffusion.schedule.discrete import Discrete
from latentgen.diffusion.schedule.protocol import LOGSNR_MAX, LOGSNR_MIN, Schedule
from latentgen.errors import InputError
from latentgen.values import shown

Grid = Literal["whole", "fractional"]
Final = Literal["zero", "first", "last"]

TIME_SPACINGS = ("trailing", "leading", "linspace")
LEVEL_SPACINGS = ("karras", "exponential", "uniform-logsnr")
SPACINGS = (*TIME_SPACINGS, *LEVEL_SPACINGS, "lcm")


def knots(
    schedule: Schedule,
    steps: int,
    *,
    spacing: str | Sequence[float] = "trailing",
    start: float = 1.0,
    steps_offset: int = 0,
    final: Final | float = "zero",
    grid: Grid = "whole",
    clean_counts: bool = False,
    within: str = "linspace",
    cleanest: float = 0.0,
    rho: float = 7.0,
    original_steps: int = 50,
) -> np.ndarray:
    """The steps + 1 logSNR levels of a sampler, increasing (noise falls), float64.

    spacing: where the levels lie. "leading", "trailing" and "linspace" are Lin et al. 2023, table 2, over the table's
    indices (or over t for a continuous schedule); "karras" (Karras et al. 2022, eq. 5, with `rho`), "exponential"
    (equal ratios of sigma/alpha) and "uniform-logsnr" (the same thing, said of logSNR) lie between the first and last
    level of the time spacing `within`, or of the "whole" schedule; "lcm" skips through `original_steps` (Luo et al.
    2023); a list of `steps` falling times (table indices; of a flow what the network is told, 0 to 1000; t for another
    continuous schedule) is taken as it is (align-your-steps gives such lists).
    start: the part of the way to walk, as diffusers' strength: 0.6 of 50 steps are the last 30.
    steps_offset: added to "leading" indices. final: the last knot: "zero" (clean), "first" (the schedule's cleanest
    level), "last" (the level before it again, as DEIS does), or a logSNR. grid: whether "linspace" indices are rounded.
    clean_counts: whether "leading" and "linspace" count the clean end as one of the steps (DPM-Solver, UniPC, DEIS).
    cleanest: the last t that "linspace" visits on a continuous schedule.
    Raises InputError for steps below 1, more steps than the table has entries for, times that it has not, an unknown
    spacing, or a start that leaves no step.
    """
    if steps < 1:
        raise InputError(f"the number of steps is {steps}; it must be 1 or more")
    level_spacing = spacing if isinstance(spacing, str) and spacing in LEVEL_SPACINGS else None
    spacing = within if level_spacing else spacing
    if level_spacing and within == "whole":
        levels = np.array([float(schedule.logsnr(1.0)), float(schedule.logsnr(0.0))])
    elif isinstance(schedule, Discrete):
        if steps > len(schedule):
            raise InputError(f"{shown(steps)} steps are more than the {len(schedule)} levels the schedule has")
        levels = _table_levels(schedule, steps, spacing, steps_offset, grid, clean_counts, original_steps)
        if not level_spacing and np.any(np.diff(levels) <= 0):
            raise InputError(
                f"{steps} steps do not fit the {len(schedule)} levels the schedule has, {spacing} spaced: some would "
                "stay where they are; take fewer"
            )
    else:
        levels = _continuous_levels(schedule, steps, spacing, clean_counts, cleanest)
    if level_spacing:
        levels = _ramp(level_spacing, levels[0], levels[-1], steps, rho)
    levels = np.append(levels, _final_level(schedule, final, levels))
    return levels[len(levels) - 1 - _kept(len(levels) - 1, start) :]


def table_indices(
    entries: int, steps: int, spacing: str, *, steps_offset: int = 0, grid: Grid = "whole", clean_counts: bool = False
) -> np.ndarray:
    """Table indices, falling, float64 (steps,): Lin et al. 2023, table 2, to diffusers' rounding."""
    counted = steps + 1 if clean_counts else steps
    if spacing == "leading":
        indices = np.arange(counted)[::-1][:steps] * float(entries // counted) + steps_offset
    elif spacing == "trailing":
        indices = np.round(entries - np.arange(steps) * (entries / steps)) - 1
    else:
        indices = np.linspace(0, entries - 1, counted)[::-1][:steps]
        indices = np.round(indices) if grid == "whole" else indices.astype(np.float32).astype(np.float64)
    return np.clip(indices, 0, entries - 1)


def _table_levels(
    schedule: Discrete,
    steps: int,
    spacing: str | Sequence[float],
    steps_offset: int,
    grid: Grid,
    clean_counts: bool,
    original_steps: int,
) -> np.ndarray:
    entries = len(schedule)
    if not isinstance(spacing, str):
        indices = np.asarray(spacing, dtype=np.float64)
        if indices.ndim != 1 or len(indices) != steps or np.any(np.diff(indices) >= 0):
            raise InputError(f"a list of times must hold {steps} falling numbers, one for each step")
        if indices[0] > entries - 1 or indices[-1] < 0:
            raise InputError(f"times are {indices[0]:g} to {indices[-1]:g}; the schedule has 0 to {entries - 1}")
    elif spacing == "lcm":
        if not steps <= original_steps <= entries:
            raise InputError(f"{steps} LCM steps need at least as many original steps, and at most {entries}")
        origin = np.arange(original_steps, 0, -1) * (entries // original_steps) - 1
        indices = origin[np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(int)]
    elif spacing in TIME_SPACINGS:
        options = {"steps_offset": steps_offset, "grid": grid, "clean_counts": clean_counts}
        indices = table_indices(entries, steps, spacing, **options)  # type: ignore[arg-type]
    else:
        raise InputError(f"unknown spacing {spacing!r}; it can be one of: {', '.join(SPACINGS)}")
    return np.array([schedule.at(float(index)) for index in indices])


def _continuous_levels(
    schedule: Schedule, steps: int, spacing: str | Sequence[float], clean_counts: bool, cleanest: float
) -> np.ndarray:
    """Levels at t: trailing t_i = 1 − i/n; leading one step later; linspace from 1 to the cleanest."""
    count = np.arange(steps)
    placed: dict[str, Callable[[], np.ndarray]] = {
        "trailing": lambda: 1 - count / steps,
        "leading": lambda: 1 - (count + 1) / (steps + 1),
        "linspace": lambda: np.linspace(1, cleanest, steps + clean_counts)[:steps],
    }
    if not isinstance(spacing, str):
        times = np.asarray(spacing, dtype=np.float64)
        if times.ndim != 1 or len(times) != steps or np.any(np.diff(times) >= 0):
            raise InputError(f"a list of times must hold {steps} falling numbers, one for each step")
        flow = isinstance(schedule, RectifiedFlow)
        if times[0] > (most := 1000 if flow else 1) or times[-1] < 0:
            raise InputError(f"times are {times[0]:g} to {times[-1]:g}; the schedule has 0 to {most}")
        if flow:
            schedule, times = RectifiedFlow(), times / 1000  # what the network is told is behind the shift
    elif spacing in placed:
        times = placed[spacing]()
    else:
        raise InputError(f"unknown spacing {spacing!r}; it can be one of: {', '.join([*placed, *LEVEL_SPACINGS])}")
    return np.array([float(schedule.logsnr(float(t))) for t in times])


def _ramp(spacing: str, noisiest: float, cleanest: float, steps: int, rho: float) -> np.ndarray:
    """steps levels from the noisiest to the cleanest, both included."""
    position = np.linspace(0, 1, steps)
    if spacing == "karras":  # Karras et al. 2022, eq. 5, in sigma/alpha = exp(−logsnr/2)
        high, low = math.exp(-0.5 * noisiest / rho), math.exp(-0.5 * cleanest / rho)
        return -2 * rho * np.log(high + position * (low - high))
    return noisiest + position * (cleanest - noisiest)


def _final_level(schedule: Schedule, final: Final | float, levels: np.ndarray) -> float:
    if not isinstance(final, str):
        return min(max(float(final), LOGSNR_MIN), LOGSNR_MAX)
    if final not in ("zero", "first", "last"):
        raise InputError(f"unknown final level {final!r}; it can be zero, first, last, or a logSNR")
    return {"zero": LOGSNR_MAX, "first": float(schedule.logsnr(0.0)), "last": float(levels[-1])}[final]


def _kept(steps: int, start: float) -> int:
    """How many of the steps are walked when one starts part of the way (diffusers' strength)."""
    if not 0 < start <= 1 or int(steps * start) < 1:
        raise InputError(
            f"a start of {start} leaves none of {steps} steps; it must be in (0, 1] and leave at least one"
        )
    return int(steps * start)
