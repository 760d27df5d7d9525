"""One scheduler's config read as another's, as when somebody changes the sampler of a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentgen.diffusion.schedule.plan import FAMILIES, Plan, from_config
from latentgen.errors import InputError

# The diffusers scheduler that stands for each sampler: it says how the folder's scheduler config is to be read.
_DPM = {"_class_name": "DPMSolverMultistepScheduler"}
_PNDM = {"_class_name": "PNDMScheduler"}
SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler"},
    "ddpm": {"_class_name": "DDPMScheduler"},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "euler-ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    "lms": {"_class_name": "LMSDiscreteScheduler"},
    "dpmpp-2m": {**_DPM, "algorithm_type": "dpmsolver++"},
    "dpmpp-2m-sde": {**_DPM, "algorithm_type": "sde-dpmsolver++"},
    "dpmpp-sde": {"_class_name": "DPMSolverSDEScheduler"},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "deis": {"_class_name": "DEISMultistepScheduler"},
    "plms": {**_PNDM, "skip_prk_steps": True},
    "pndm": {**_PNDM, "skip_prk_steps": False},
    "lcm": {"_class_name": "LCMScheduler"},
}
OUTPUT = {"plms", "pndm"}  # samplers that extrapolate what the network puts out


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """The config of a diffusers scheduler; a config itself as it is. Raises InputError for anything else."""
    if isinstance(scheduler, Mapping):
        return scheduler
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise InputError(
            f"scheduler_config is a {type(scheduler).__name__}; it must be what scheduler_config.json holds, or a "
            "diffusers scheduler"
        )
    return {**config, "_class_name": type(scheduler).__name__}


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the class that a scheduler config names has a reading of its own here."""
    return str(config.get("_class_name", "DDIMScheduler")) in FAMILIES


def known(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config as it stands, or, where its class is not known but its betas are, as DDIM's without clipping."""
    betas = config.get("trained_betas") is not None or None not in (config.get("beta_start"), config.get("beta_end"))
    if is_known(config) or not betas:
        return config
    return {"clip_sample": False, **config, "_class_name": "DDIMScheduler"}


def as_pipelines_take(config: Mapping[str, Any], second: bool) -> dict[str, Any]:
    """A checkpoint's scheduler config as diffusers' pipeline reads it: StableDiffusionPipeline, or XL's (`second`).

    The former clips no latents and counts "leading" steps from 1, whatever a config from before that was settled says.
    """
    return {**config, **({} if second else {"clip_sample": False, "steps_offset": 1})}


def plan_for(config: Mapping[str, Any], sampler: str) -> Plan:
    """A scheduler config's plan under a sampler: its own as it stands, else as that sampler's scheduler reads it.

    So does `OtherScheduler.from_config(scheduler.config)` in diffusers, but that x0 is never clipped unless the config
    says so, since latents have no bounds, and that rescale_betas_zero_snr is every sampler's, since the table is the
    network's: diffusers' Heun, LMS, DPMSolverSDE, DEIS and PNDM have no such key. Samplers that diffusers has not are
    read as DDIM, and end without noise; of these probability-flow walks to the cleanest level whatever the steps are.
    heun is diffusers' to the letter where the config names it; else it takes no correction where there is but noise.
    A straight line has no betas to read anew: see `_on_a_line`.
    """
    config = known(config)
    plan = from_config(config)
    if sampler == plan.sampler:
        return plan
    if plan.prediction.name == "flow":
        plan = _on_a_line(plan, sampler)
    else:
        read_as = SCHEDULERS.get(sampler, SCHEDULERS["ddim"])
        own = ("solver_type",) if config.get("_class_name") != read_as["_class_name"] else ()
        kept = {key: value for key, value in config.items() if key not in own and value is not None}
        plan = from_config({"clip_sample": False, **kept, **read_as})
        plan = plan if sampler in SCHEDULERS else replace(plan, sampler=sampler, final="zero", options={})
    if sampler == "probability-flow":
        return replace(plan, options={"end": float(plan.schedule.logsnr(0.0))})
    return replace(plan, options={}) if sampler == "heun" else plan


def _on_a_line(plan: Plan, sampler: str) -> Plan:
    """A flow's plan under another sampler than its own: equal steps in t, the last one to clean.

    So diffusers' solvers walk with use_flow_sigmas; FlowMatchEuler's last step before clean, from 1/1000, is Euler's
    alone, and too far a leap in logSNR for a method of several steps.
    """
    options = {"of": "v"} if sampler in OUTPUT else {}
    return replace(plan, sampler=sampler, spacing="trailing", cleanest=0.0, options=options)
