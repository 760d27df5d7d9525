"""From a scheduler_config.json, as diffusers writes it, to the schedule, prediction, knots and sampler it names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule.continuous import RectifiedFlow
from latentgen.diffusion.schedule.discrete import (
    Discrete,
    Interpolation,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
)
from latentgen.diffusion.schedule.knots import TIME_SPACINGS, Final, Grid, knots
from latentgen.diffusion.schedule.protocol import Schedule
from latentgen.errors import InputError

LANGEVIN_STEPS = 100  # at each level it takes away some 40% of the noise that is too much, so that leaps last
TINY_ALPHA_BAR = 2.0**-24  # what diffusers' sigma-based schedulers put for an alpha-bar of 0


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is meant to be sampled: everything its scheduler's config says, and nothing else.

    `initial` says what the first latents are: "unit" (x = eps) or "sigma" (x = sigma·eps; Euler's family, where the
    spacing starts at the noisiest level). `clip` bounds x0 (pixel models). `options` go to the sampler as keywords.
    """

    schedule: Schedule
    prediction: Prediction
    sampler: str = "ddim"
    spacing: str = "trailing"
    steps_offset: int = 0
    final: Final = "zero"
    grid: Grid = "whole"
    clean_counts: bool = False
    within: str = "linspace"
    cleanest: float = 0.0
    original_steps: int = 50
    initial: Literal["unit", "sigma"] = "unit"
    clip: float | None = None
    threshold: float | None = None
    threshold_max: float = 1.0
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def knots(self, steps: int, *, start: float = 1.0, spacing: str | Sequence[float] | None = None) -> np.ndarray:
        """The levels of `steps` steps, as the config's scheduler would place them; (steps + 1,) logSNR, float64.

        spacing: another one, or a list of times, as `knots` takes them. Raises InputError as `knots` does, and where
        they are too few for a sampler that cannot leap out of pure noise.
        """
        levels = knots(
            self.schedule,
            steps,
            spacing=self.spacing if spacing is None else spacing,
            start=start,
            steps_offset=self.steps_offset,
            final=self.final,
            grid=self.grid,
            clean_counts=self.clean_counts,
            within=self.within,
            cleanest=self.cleanest,
            original_steps=self.original_steps,
        )
        if self.sampler == "langevin" and levels[0] < -10 and steps < LANGEVIN_STEPS:
            raise InputError(
                f"sampler 'langevin' takes {LANGEVIN_STEPS} steps or more out of noise as strong as this schedule's, "
                f"not {steps}; another sampler takes fewer"
            )
        return levels

    def initial_scale(self, logsnr: float) -> float:
        """What standard normal noise is multiplied by to give the first x, at the first knot."""
        return float(self.schedule.marginal(logsnr)[1]) if self.initial == "sigma" else 1.0


def from_config(config: Mapping[str, Any]) -> Plan:
    """The plan that a diffusers scheduler config (a dict as in scheduler_config.json) stands for.

    Keys that are absent have the defaults of the scheduler that `_class_name` names. Raises InputError for a class,
    beta table or option that has no counterpart here; nothing is passed over in silence.
    """
    name = str(config.get("_class_name", "DDIMScheduler"))
    if name not in FAMILIES:
        raise InputError(f"scheduler {name!r} is not known; it can be one of: {', '.join(sorted(FAMILIES))}")
    for key in ("use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"):
        if config.get(key):
            raise InputError(f"{name}: {key} is not supported; turn it off in scheduler_config.json")
    return FAMILIES[name](config)


def _betas(config: Mapping[str, Any], start: float = 1e-4, end: float = 0.02, kind: str = "linear") -> np.ndarray:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float32)
    levels = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", start)), float(config.get("beta_end", end))
    tables: dict[str, Callable[[], np.ndarray]] = {
        "linear": lambda: linear_betas(levels, start, end),
        "scaled_linear": lambda: scaled_linear_betas(levels, start, end),
        "squaredcos_cap_v2": lambda: cosine_betas(levels),
        "sigmoid": lambda: sigmoid_betas(levels, start, end),
    }
    kind = str(config.get("beta_schedule", kind))
    if kind not in tables:
        raise InputError(f"beta_schedule {kind!r} is not known; it can be one of: {', '.join(tables)}")
    return tables[kind]()


def _schedule(config: Mapping[str, Any], betas: np.ndarray, *, finite: bool = False, **options: Any) -> Discrete:
    """The table; `finite` puts the smallest half-precision number for a zero alpha-bar, as the sigma family does."""
    rescale = bool(config.get("rescale_betas_zero_snr", False))
    floor = TINY_ALPHA_BAR if rescale and finite else 0.0
    return Discrete.from_betas(betas, rescale_betas_zero_snr=rescale, floor=floor, **options)


def _shared(config: Mapping[str, Any], spacing: str) -> dict[str, Any]:
    """The fields every family of betas reads the same way; `spacing` is the family's default."""
    prediction = Prediction(str(config.get("prediction_type", "epsilon")))
    spacing = str(config.get("timestep_spacing", spacing))
    if prediction.name == "flow":
        raise InputError("prediction_type 'flow_prediction' has no betas; it takes a FlowMatchEulerDiscreteScheduler")
    if spacing not in TIME_SPACINGS:
        raise InputError(f"timestep_spacing {spacing!r} is not known; it can be one of: {', '.join(TIME_SPACINGS)}")
    return {
        "prediction": prediction,
        "spacing": spacing,
        "steps_offset": int(config.get("steps_offset", 0)),
        "threshold": float(config.get("dynamic_thresholding_ratio", 0.995)) if config.get("thresholding") else None,
        "threshold_max": float(config.get("sample_max_value", 1.0)),
    }


def _unbounded(shared: dict[str, Any]) -> dict[str, Any]:
    """The same for the families whose diffusers schedulers know no thresholding, and pass its keys over."""
    return {key: value for key, value in shared.items() if not key.startswith("threshold")}


def _clip(config: Mapping[str, Any], default: bool) -> float | None:
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", default) else None


def _ddim(config: Mapping[str, Any]) -> Plan:
    to_one = config.get("set_alpha_to_one", True)
    return Plan(
        schedule=_schedule(config, _betas(config)),
        sampler="ddim",
        final="zero" if to_one else "first",
        clip=_clip(config, True),
        **_shared(config, "leading"),
    )


def _ddpm(config: Mapping[str, Any]) -> Plan:
    variance = str(config.get("variance_type", "fixed_small")).replace("_", "-").removesuffix("-log")
    if variance not in ("fixed-small", "fixed-large", "learned-range"):
        raise InputError(
            f"variance_type {variance!r} is not supported; it can be fixed_small, fixed_large, learned_range"
        )
    return Plan(
        schedule=_schedule(config, _betas(config)),
        sampler="ddpm",
        clip=_clip(config, True),
        options=MappingProxyType({"variance": variance}),
        **_shared(config, "leading"),
    )


def _pndm(config: Mapping[str, Any]) -> Plan:
    schedule, plms = _schedule(config, _betas(config)), bool(config.get("skip_prk_steps", False))
    shared = _shared(config, "leading")
    of = "v" if shared["prediction"].name == "v" else "eps"  # diffusers combines what the network puts out

    def midpoint(logsnr: float, next_logsnr: float) -> float:
        start, end = round(schedule.time(logsnr)), round(schedule.time(next_logsnr))
        return float(schedule.at(start - (start - end) // 2))

    return Plan(
        schedule=schedule,
        sampler="plms" if plms else "pndm",
        final="zero" if config.get("set_alpha_to_one", False) else "first",
        options=MappingProxyType({"of": of} | ({} if plms else {"midpoint": midpoint})),
        **_unbounded(shared),
    )


def _euler_family(
    sampler: str, start: float = 1e-4, end: float = 0.02, interpolation: Interpolation = "sigma"
) -> Callable[[Mapping[str, Any]], Plan]:
    """Samplers that diffusers writes in the VE frame: x/sqrt(1 + sigma²) there is our x in the VP frame."""

    def build(config: Mapping[str, Any]) -> Plan:
        if config.get("interpolation_type", "linear") != "linear" or config.get("timestep_type") == "continuous":
            raise InputError(f"{sampler}: only linear interpolation_type and discrete timestep_type are supported")
        if config.get("sigma_min") is not None or config.get("sigma_max") is not None:
            raise InputError(f"{sampler}: sigma_min and sigma_max are not supported; remove them from the config")
        shared = _shared(config, "linspace")
        level = None if sampler == "euler-ancestral" else _level_spacing(config)  # diffusers' class has no such keys
        asked = sampler == "euler" and config.get("final_sigmas_type") == "sigma_min"  # nor have the others this one
        held: Final = "first" if asked else "zero"
        betas = _betas(config, start, end)
        schedule = _schedule(config, betas, finite=True, interpolation="logsnr" if level else interpolation)
        return Plan(
            schedule=schedule,
            sampler=sampler,
            final=held,
            grid="fractional",
            within=shared["spacing"],
            initial="unit" if shared["spacing"] == "leading" else "sigma",
            clip=_clip(config, False) if sampler == "heun" else None,
            options=MappingProxyType({"always": True} if sampler == "heun" else {}),
            **(_unbounded(shared) | ({"spacing": level} if level else {})),
        )

    return build


def _level_spacing(config: Mapping[str, Any]) -> str | None:
    if config.get("use_karras_sigmas"):
        return "karras"
    return "exponential" if config.get("use_exponential_sigmas") else None


def _multistep(
    config: Mapping[str, Any],
    sampler: str,
    final: Final,
    options: Mapping[str, Any],
    *,
    floor_cosine: bool = False,
) -> Plan:
    """DPM-Solver++, UniPC, DEIS: the clean end counts as a step, and the network is told whole times only."""
    lowest = config.get("lambda_min_clipped")
    if lowest is not None and float(lowest) > -1e9:
        raise InputError(f"{sampler}: lambda_min_clipped is not supported; remove it from the config")
    level = _level_spacing(config)
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    rounding = "none" if level is None else "nearest" if level == "karras" else "down"
    if level == "karras" and cosine and floor_cosine:
        rounding = "down"
    schedule = _schedule(config, _betas(config), finite=True, rounding=rounding)
    return Plan(
        schedule=schedule,
        sampler=sampler,
        final=final,
        clean_counts=True,
        within="whole",
        options=MappingProxyType(dict(options)),
        **(_shared(config, "linspace") | ({"spacing": level} if level else {})),
    )


def _dpmpp(config: Mapping[str, Any]) -> Plan:
    algorithm = str(config.get("algorithm_type", "dpmsolver++"))
    samplers = {"dpmsolver++": "dpmpp-2m", "deis": "dpmpp-2m", "sde-dpmsolver++": "dpmpp-2m-sde"}
    if algorithm not in samplers:
        raise InputError(f"algorithm_type {algorithm!r} is not supported; it can be one of: {', '.join(samplers)}")
    options = {
        "order": int(config.get("solver_order", 2)),
        "solver": "heun" if config.get("solver_type") == "heun" else "midpoint",  # other solvers' types are midpoint
        "lower_order_final": bool(config.get("lower_order_final", True)),
        "euler_at_final": bool(config.get("euler_at_final", False)),
    }
    final: Final = "first" if config.get("final_sigmas_type") == "sigma_min" else "zero"
    return _multistep(config, samplers[algorithm], final, options, floor_cosine=True)


def _unipc(config: Mapping[str, Any]) -> Plan:
    if not config.get("predict_x0", True) or config.get("disable_corrector") or config.get("solver_p"):
        raise InputError("unipc: only predict_x0 with the corrector at every step is supported")
    options = {
        "order": int(config.get("solver_order", 2)),
        "solver": "bh1" if config.get("solver_type") == "bh1" else "bh2",  # other solvers' types are bh2
        "lower_order_final": bool(config.get("lower_order_final", True)),
    }
    held: Final = "last" if _level_spacing(config) else "first"
    return _multistep(config, "unipc", held if config.get("final_sigmas_type") == "sigma_min" else "zero", options)


def _deis(config: Mapping[str, Any]) -> Plan:
    options = {
        "order": int(config.get("solver_order", 2)),
        "lower_order_final": bool(config.get("lower_order_final", True)),
    }
    return _multistep(config, "deis", "last" if _level_spacing(config) else "first", options)


def _lcm(config: Mapping[str, Any]) -> Plan:
    schedule = _schedule(config, _betas(config, 0.00085, 0.012, "scaled_linear"))
    scaling = float(config.get("timestep_scaling", 10.0))
    shared = _shared(config, "leading") | {"spacing": "lcm"}
    return Plan(
        schedule=schedule,
        sampler="lcm",
        original_steps=int(config.get("original_inference_steps", 50)),
        clip=_clip(config, False),
        options=MappingProxyType({"boundary": lambda logsnr: consistency_boundary(scaling * schedule.time(logsnr))}),
        **shared,
    )


def _flow(config: Mapping[str, Any]) -> Plan:
    """Flow matching as diffusers samples it by itself: linspace down to the shifted 1/N, then shifted once more."""
    for key in (
        "shift_terminal",
        "invert_sigmas",
        "stochastic_sampling",
        "use_karras_sigmas",
        "use_exponential_sigmas",
    ):
        if config.get(key):
            raise InputError(f"flow matching: {key} is not supported; turn it off in scheduler_config.json")
    levels, shift = int(config.get("num_train_timesteps", 1000)), float(config.get("shift", 1.0))
    if levels != 1000:
        raise InputError(
            f"flow matching: num_train_timesteps is {levels}; networks are told 1000·sigma, so it must be 1000"
        )
    return Plan(
        schedule=RectifiedFlow(shift),
        prediction=Prediction("flow"),
        sampler="euler",
        spacing="linspace",
        cleanest=shift / levels / (1 + (shift - 1) / levels),
    )


def consistency_boundary(time: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(c_skip, c_out) of a consistency model (Song et al. 2023, appendix C; Luo et al. 2023, eq. 9)."""
    return sigma_data**2 / (time**2 + sigma_data**2), time / (time**2 + sigma_data**2) ** 0.5


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Plan]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "EulerDiscreteScheduler": _euler_family("euler"),
    "EulerAncestralDiscreteScheduler": _euler_family("euler-ancestral"),
    "HeunDiscreteScheduler": _euler_family("heun", 0.00085, 0.012),
    "LMSDiscreteScheduler": _euler_family("lms"),
    "DPMSolverSDEScheduler": _euler_family("dpmpp-sde", 0.00085, 0.012, interpolation="logsnr"),
    "DPMSolverMultistepScheduler": _dpmpp,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "LCMScheduler": _lcm,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
