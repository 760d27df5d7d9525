"""Every sampler that diffusers has, on every family of Stable Diffusion, makes diffusers' picture.

SD 1 (eps), SD 2 (v, OpenCLIP's tower) and XL (two towers), from the same latents and, where noise is drawn, from the
same generator; with guidance off, and with guidance, rescale and a negative prompt for a batch that is not square.
"""

import importlib
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentgen import Pipeline
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.schedule.plan import FAMILIES
from latentgen.diffusion.schedule.reading import SCHEDULERS

TOLERANCE = 2e-3  # in [0, 1], what is promised; what is measured is below 2e-5
STEPS = 4
Pair = tuple[Pipeline, Any]

# sampler: (diffusers' scheduler, what its config says besides)
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False}),
    "lcm": ("LCMScheduler", {}),
}


@pytest.fixture(scope="module")
def pair(make_folder: Callable[..., Path], two: Path, xl: Path) -> Callable[[str], Pair]:
    """(ours, diffusers') of one family's folder."""
    folders = {"sd1": lambda: make_folder("sd1"), "sd2": lambda: two, "xl": lambda: xl}

    @cache
    def make(family: str) -> Pair:
        place = folders[family]()
        kind = diffusers.StableDiffusionXLPipeline if family == "xl" else diffusers.StableDiffusionPipeline
        theirs = kind.from_pretrained(place)
        theirs.set_progress_bar_config(disable=True)
        theirs.own = dict(theirs.scheduler.config)
        return Pipeline.from_pretrained(place, engine="torch"), theirs

    return make


class Drawn:
    """What stands for diffusers' Brownian tree: the picture's generator, as ours draws from one."""

    generator: torch.Generator

    def __init__(self, x: torch.Tensor, *_: Any, **__: Any) -> None:
        self.shape = x.shape

    def __call__(self, *_: Any) -> torch.Tensor:
        return torch.randn(self.shape, generator=Drawn.generator)


def scheduler_of(sampler: str, config: dict[str, Any]) -> Any:
    name, options = TABLE[sampler]
    kept = {key: value for key, value in config.items() if key not in ("solver_type", "clip_sample")}
    if sampler == "dpmpp-sde":
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # only its noise, which is replaced
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
        return module.DPMSolverSDEScheduler.from_config(kept, **options)
    return getattr(diffusers, name).from_config({"clip_sample": False, **kept}, **options)


def test_the_table_holds_every_scheduler_that_is_read() -> None:
    named = {name for name, _ in TABLE.values()}
    assert set(FAMILIES) - named == {"FlowMatchEulerDiscreteScheduler"}  # of other families than Stable Diffusion
    assert set(SCHEDULERS) <= set(TABLE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize("sampler", TABLE)
def test_the_picture_is_that_of_diffusers(
    pair: Callable[[str], Pair], family: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(family)
    theirs.scheduler = scheduler_of(sampler, theirs.own)
    if sampler == "dpmpp-sde":
        module = sys.modules[type(theirs.scheduler).__module__]
        monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Drawn)
    ours.scheduler = {**theirs.scheduler.config, "_class_name": TABLE[sampler][0]}
    name = sampler.partition(",")[0]
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["a red apple"], {"guidance_scale": 1.0, "height": 32, "width": 32}),
        (
            ["a blue bird", "the green frog and the yellow car"],
            {
                "guidance_scale": 4.0,
                "guidance_rescale": 0.6,
                "negative_prompt": ["rain", "an orange cat"],
                "height": 16,
                "width": 40,
            },
        ),
    ]
    for prompts, given in cases:
        noise = Noise(range(len(prompts))).initial((4, given["height"] // 4, given["width"] // 4))
        given |= {"num_inference_steps": STEPS, "output_type": "np", "latents": torch.from_numpy(noise)}
        Drawn.generator = torch.Generator().manual_seed(7)
        expected = theirs(prompts, generator=Drawn.generator, **given).images
        found = ours(prompts, sampler=name, generator=torch.Generator().manual_seed(7), **given).images
        assert expected.std() > 0.03  # a picture, not a grey field
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_embeddings_passed_in_are_those_of_diffusers(pair: Callable[[str], Pair], family: str) -> None:
    """Two prompts' embeddings, two pictures of each, negative ones too, and the pooled ones of XL."""
    ours, theirs = pair(family)
    theirs.scheduler = scheduler_of("ddim", theirs.own)
    ours.scheduler = {**theirs.scheduler.config, "_class_name": "DDIMScheduler"}
    prompts, negatives = ["a red apple", "a blue bird"], ["rain", ""]
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, theirs.encode_prompt(prompts, negative_prompt=negatives, **options), strict=False))
    given |= {"latents": torch.from_numpy(Noise(range(4)).initial((4, 8, 6))), "height": 32, "width": 24}
    given |= {"num_images_per_prompt": 2, "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    expected = theirs(**given).images
    assert expected.shape == (4, 32, 24, 3) and expected.std() > 0.03
    np.testing.assert_allclose(ours(sampler="ddim", **given).images, expected, atol=TOLERANCE)


@pytest.mark.parametrize("negative", [None, "", ["rain", ""]])
def test_no_negative_prompt_and_an_empty_one_are_what_they_are_in_diffusers(
    pair: Callable[[str], Pair], negative: Any
) -> None:
    """XL's base model was trained with zeros for none; the empty text, where it is given, is encoded."""
    ours, theirs = pair("xl")
    theirs.scheduler = scheduler_of("ddim", theirs.own)
    ours.scheduler = {**theirs.scheduler.config, "_class_name": "DDIMScheduler"}
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    given |= {"latents": torch.from_numpy(Noise(range(2)).initial((4, 8, 6))), "height": 32, "width": 24}
    prompts = ["a red apple", "a blue bird"]
    expected = theirs(prompts, negative_prompt=negative, **given).images
    found = ours(prompts, negative_prompt=negative, sampler="ddim", **given)
    np.testing.assert_allclose(found.images, expected, atol=TOLERANCE)
    assert found.settings.get("negative_said", False) == (negative is not None)
