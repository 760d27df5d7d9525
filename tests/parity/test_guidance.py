"""Guidance beyond the scale: perturbed attention, thresholding, learned variance, intervals, as diffusers has them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPAGPipeline, StableDiffusionPipeline, UNet2DConditionModel

from latentgen import InputError, Pipeline
from latentgen.diffusion.noise import Noise
from latentgen.guiding import engine_of
from latentgen.render import replay

TOLERANCE = 2e-4
COMMON: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "np"}


@pytest.fixture(scope="module")
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder("guided")


def latents(seed: int) -> torch.Tensor:
    return torch.from_numpy(Noise([seed]).initial((4, 8, 8)))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_perturbed_attention_is_that_of_diffusers(folder: Path, guidance: float) -> None:
    theirs = quiet(StableDiffusionPAGPipeline.from_pretrained(folder, pag_applied_layers=["mid"]))
    given = {**COMMON, "guidance_scale": guidance, "latents": latents(3)}
    ours = Pipeline.from_pretrained(folder, engine="torch")
    expected = theirs("a red apple", pag_scale=3.0, **given).images
    found = ours("a red apple", pag_scale=3.0, **given).images
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    plain = ours("a red apple", **given).images
    assert np.abs(found - plain).max() > 10 * TOLERANCE
    again = ours("a red apple", pag_scale=3.0, **given).images
    np.testing.assert_array_equal(again, found)  # the attention was put back


def test_dynamic_thresholding_of_a_config_is_that_of_diffusers(folder: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    theirs = quiet(StableDiffusionPipeline.from_pretrained(folder, engine="torch"))
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config, **options)
    ours = Pipeline.from_pretrained(folder, engine="torch")
    ours.scheduler = {"_class_name": "DPMSolverMultistepScheduler", **theirs.scheduler.config}
    given = {**COMMON, "latents": latents(4)}
    expected = theirs("a blue bird", **given).images
    np.testing.assert_allclose(ours("a blue bird", sampler="dpmpp-2m", **given).images, expected, atol=TOLERANCE)
    ours.scheduler = {**ours.scheduler, "thresholding": False}
    assert np.abs(ours("a blue bird", sampler="dpmpp-2m", **given).images - expected).max() > 10 * TOLERANCE


def test_a_learned_variance_is_that_of_diffusers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net of twice the channels, and DDPM with `learned_range`; the noise of both is set to the same numbers."""
    ours = Pipeline.from_pretrained(folder, engine="torch")
    config = json.loads((folder / "unet" / "config.json").read_text())
    torch.manual_seed(5)
    unet = UNet2DConditionModel.from_config({**config, "out_channels": 2 * config["in_channels"]}).eval()
    with torch.no_grad():  # v lies in [-1, 1], as it does where it was learned
        for part in (unet.conv_out.weight, unet.conv_out.bias):
            part[config["in_channels"] :] *= 0.1
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", variance_type="learned_range",
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    from latentgen.models.network import unet_network

    states = ours.text.encode(["a red apple"]).states
    drawn = torch.randn(40, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    scheduler.set_timesteps(6)
    x, taken = latents(6), iter(drawn)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(taken))
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(x, t, encoder_hidden_states=states).sample
            x = scheduler.step(out, t, x).prev_sample

    ours.network, ours.scheduler = unet_network(unet), {"_class_name": "DDPMScheduler", **scheduler.config}
    monkeypatch.setattr(Noise, "step", lambda self, index, like, span=None: drawn[index])
    given = {"num_inference_steps": 6, "guidance_scale": 1.0, "latents": latents(6), "output_type": "latent"}
    found = ours("a red apple", sampler="ddpm", **given).images
    np.testing.assert_allclose(found.numpy(), x.numpy(), atol=2e-4)


def test_outside_its_interval_guidance_costs_and_does_nothing(folder: Path) -> None:
    ours = Pipeline.from_pretrained(folder, engine="torch")
    batches: list[int] = []
    network = ours.network

    def counted(x: Any, time: Any, condition: Any) -> Any:
        batches.append(len(x))
        return network(x, time, condition)

    ours.network = counted
    ours("a red apple", guidance_interval=(0.0, 0.5), **COMMON, seed=1)
    assert batches == [2, 2, 2, 1, 1, 1]
    batches.clear()
    ours("a red apple", guidance_interval=(0.34, 1.0), **COMMON, seed=1)
    assert batches == [1, 1, 2, 2, 2, 2]
    batches.clear()
    ours("a red apple", guidance_interval=(0.95, 1.0), **COMMON, seed=1)
    assert batches == [1, 1, 1, 1, 1, 2]  # however thin, the part is of one step or more
    batches.clear()
    perturbed, asked = ours.perturbed, list[int]()
    assert perturbed is not None

    def counted_too(x: Any, time: Any, condition: Any) -> Any:
        asked.append(len(x))
        return perturbed(x, time, condition)

    ours.perturbed = counted_too
    ours("a red apple", guidance_interval=(0.0, 0.5), **COMMON, pag_scale=2.0, seed=1)
    assert asked == [1, 1, 1] and batches == [2, 2, 2, 1, 1, 1]
    whole = ours("a red apple", guidance_interval=(0.0, 1.0), **COMMON, seed=1).images
    np.testing.assert_array_equal(whole, ours("a red apple", **COMMON, seed=1).images)


def test_projection_with_eta_1_and_no_norm_is_plain_guidance(folder: Path) -> None:
    ours = Pipeline.from_pretrained(folder, engine="torch")
    plain = ours("a red apple", **COMMON, seed=1).images
    same = ours("a red apple", guidance_projection=(1.0, None), **COMMON, seed=1).images
    np.testing.assert_allclose(same, plain, atol=1e-4)
    other = ours("a red apple", guidance_projection=(0.0, 2.0), **COMMON, seed=1)
    assert np.abs(other.images - plain).max() > 1e-3
    assert other.settings["guidance_projection"] == (0.0, 2.0)


def test_projection_takes_a_momentum_which_moves_all_steps_but_the_first(folder: Path) -> None:
    ours = Pipeline.from_pretrained(folder, engine="torch")
    given = {**COMMON, "seed": 1, "output_type": "latent"}
    pairs = [
        [ours("a red apple", guidance_projection=(0.0, None, m), **{**given, "num_inference_steps": n}).images
         for m in (0.0, -0.5)]
        for n in (1, 4)
    ]  # fmt: skip
    torch.testing.assert_close(*pairs[0], rtol=0, atol=0)
    assert (pairs[1][0] - pairs[1][1]).abs().max() > 1e-3


def test_a_condition_annealed_is_noised_by_the_pictures_own_seed(folder: Path) -> None:
    ours = Pipeline.from_pretrained(folder, engine="torch")
    given = {**COMMON, "condition_annealing": (0.3, 0.8, 0.5)}
    plain = ours(["a red apple"] * 2, **COMMON, seed=1).images
    both = ours(["a red apple"] * 2, **given, seed=1)
    assert np.abs(both.images - plain).max() > 1e-3
    alone = ours("a red apple", **given, seed=2).images
    np.testing.assert_allclose(both.images[1:], alone, atol=TOLERANCE)
    assert both.settings["condition_annealing"] == (0.3, 0.8, 0.5)


def test_a_picture_of_an_annealed_condition_is_replayed_to_the_byte(folder: Path, tmp_path: Path) -> None:
    ours, picture = Pipeline.from_pretrained(folder, engine="torch"), tmp_path / "annealed.png"
    steered: dict[str, Any] = {"condition_annealing": (0.3, 0.8, 0.5), "guidance_projection": (0.0, None, -0.5)}
    plain, image = (ours("a red apple", seed=1, num_inference_steps=4, **given).images[0] for given in ({}, steered))
    image.save(picture)
    assert plain.tobytes() != image.tobytes()
    again, _ = replay(picture, tmp_path / "again.png")
    assert again.read_bytes() == picture.read_bytes()


def test_pipelines_whose_engine_was_left_to_be_chosen_guide_one_another(folder: Path) -> None:
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "output_type": "np", "weaker_scale": 2.0}
    ours, weaker = (Pipeline.from_pretrained(folder) for _ in range(2))
    plain = ours("a red apple", weaker=weaker, pag_scale=1.0, **given).images  # which only torch can
    assert engine_of(weaker) == engine_of(ours) == "torch"
    others = [Pipeline.from_pretrained(folder, engine="torch") for _ in range(2)]
    np.testing.assert_allclose(others[0]("a red apple", weaker=others[1], pag_scale=1.0, **given).images, plain)
    onnx = Pipeline.from_pretrained(folder)
    np.testing.assert_allclose(onnx("a red apple", weaker=weaker, pag_scale=1.0, **given).images, plain)


def test_autoguidance_is_away_from_the_weaker_snapshot_in_one_line(folder: Path) -> None:
    ours, weaker = (Pipeline.from_pretrained(folder, engine="torch") for _ in range(2))
    given: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 1}
    plain = ours("a red apple", **given).images
    torch.testing.assert_close(ours("a red apple", weaker=weaker, weaker_scale=3.0, **given).images, plain)
    network = weaker.network
    weaker.network = lambda x, time, condition: 0.7 * network(x, time, condition)
    one, two, three = (
        ours("a red apple", weaker=weaker, weaker_scale=scale, **given).images for scale in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(one, plain)
    assert (two - one).abs().max() > 1e-3
    torch.testing.assert_close(three - one, 2 * (two - one), rtol=1e-3, atol=1e-4)
    assert ours("a red apple", weaker=weaker, **given).settings["brought"] == ["weaker"]


def test_a_model_of_other_latents_is_no_weaker_snapshot(folder: Path) -> None:
    ours, other = (Pipeline.from_pretrained(folder, engine="torch") for _ in range(2))
    other.terms = replace(other.terms, channels=7)
    with pytest.raises(InputError, match="latent channels is 7, here 4"):
        ours("a red apple", weaker=other)


def test_a_flow_is_no_weaker_snapshot_of_a_model_that_is_none(folder: Path) -> None:
    ours, other = (Pipeline.from_pretrained(folder, engine="torch") for _ in range(2))
    other.scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(InputError, match="way to noise is a straight line, here variance preserving"):
        ours("a red apple", weaker=other)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance_interval": (0.8, 0.2)}, "two parts of the way"),
        ({"guidance_interval": (0.0, 1.5)}, "from 0 to 1"),
        ({"guidance_interval": 0.5}, "two parts of the way"),
        ({"guidance_projection": True}, "must be \\(eta, norm\\)"),
        ({"guidance_projection": (None, 3)}, "must be \\(eta, norm\\)"),
        ({"guidance_projection": (0.0, None, 1.0)}, "momentum is 1"),
        ({"condition_annealing": 0.6}, "must be \\(low, high, scale\\)"),
        ({"condition_annealing": (0.6, 0.9)}, "must be \\(low, high, scale\\)"),
        ({"condition_annealing": (0.9, 0.6, 0.1)}, "the lower one comes first"),
        ({"condition_annealing": (0.6, 0.9, 0.1), "generator": torch.Generator()}, "give a seed instead"),
        ({"pag_scale": -1}, "pag_scale"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pipeline.from_pretrained(folder, engine="torch")("a red apple", **wrong)
