"""One scheduler's config read as another's, as when somebody changes the sampler of a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentgen.diffusion.schedule.plan import FAMILIES, Plan, from_config

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


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the class that a scheduler config names has a reading of its own here."""
    return str(config.get("_class_name", "DDIMScheduler")) in FAMILIES


def known(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config as it stands, or, where its class is not known but its betas are, as DDIM's without clipping."""
    betas = config.get("trained_betas") is not None or None not in (config.get("beta_start"), config.get("beta_end"))
    if is_known(config) or not betas:
        return config
    return {"clip_sample": False, **config, "_class_name": "DDIMScheduler"}


def plan_for(config: Mapping[str, Any], sampler: str) -> Plan:
    """A scheduler config's plan under a sampler: its own as it stands, else as that sampler's scheduler reads it.

    So does `OtherScheduler.from_config(scheduler.config)` in diffusers, but that x0 is never clipped unless the config
    says so: latents have no bounds. Samplers that diffusers has not are read as DDIM, and end without noise. A straight
    line has no betas to read anew: there any sampler walks its levels.
    """
    config = known(config)
    plan = from_config(config)
    if sampler != plan.sampler and plan.prediction.name == "flow":
        return replace(plan, sampler=sampler, options={})
    if sampler != plan.sampler:
        read_as = SCHEDULERS.get(sampler, SCHEDULERS["ddim"])
        own = ("solver_type",) if config.get("_class_name") != read_as["_class_name"] else ()
        kept = {key: value for key, value in config.items() if key not in own and value is not None}
        plan = from_config({"clip_sample": False, **kept, **read_as})
        plan = plan if sampler in SCHEDULERS else replace(plan, sampler=sampler, final="zero", options={})
    return plan
