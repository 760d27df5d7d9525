"""U-Nets that are told the guidance scale (latent consistency models, Luo et al. 2023) make diffusers' pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen import InputError, Pipeline, finetune
from latentgen.checkpoint import save_pipeline
from latentgen.convert import convert
from latentgen.diffusion.denoiser import told_scale
from latentgen.diffusion.noise import Noise
from tests.conftest import SCHEDULE

TOLERANCE = 2e-4  # in [0, 1]
PROMPTS = ["a red apple", "the green frog and the yellow car"]


@pytest.fixture(scope="module")
def lcm(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random latent consistency model."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    unet: Any = UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=12)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.mul_(4)  # so that the scale matters
    config = {**SCHEDULE, "_class_name": "LCMScheduler"}
    given = {**parts, "unet": unet.eval()}
    return save_pipeline(tmp_path_factory.mktemp("lcm") / "lcm", **given, scheduler_config=config)


def call(guidance: float, **more: Any) -> dict[str, Any]:
    noise = torch.from_numpy(Noise([5, 6]).initial((4, 8, 8)))
    return {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "np", "latents": noise, **more}


@pytest.mark.parametrize("width", [12, 13, 256])
def test_the_scale_is_told_as_diffusers_tells_it(width: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([7.5 - 1]), width)
    np.testing.assert_allclose(told_scale(7.5, width), expected[0].numpy(), atol=1e-3)  # float32 of 6500 radians


@pytest.mark.parametrize("guidance", [1.0, 2.0, 8.5])
@pytest.mark.parametrize("scheduler", ["LCMScheduler", "DDIMScheduler"])
def test_the_picture_is_that_of_diffusers(lcm: Path, guidance: float, scheduler: str) -> None:
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(lcm)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config)
    ours = Pipeline.from_pretrained(lcm, engine="torch")
    ours.scheduler = {**theirs.scheduler.config, "_class_name": scheduler}
    name = {"LCMScheduler": "lcm", "DDIMScheduler": "ddim"}[scheduler]
    expected = theirs(PROMPTS, generator=torch.Generator().manual_seed(7), **call(guidance)).images
    found = ours(PROMPTS, generator=torch.Generator().manual_seed(7), sampler=name, **call(guidance)).images
    assert expected.std() > 0.03
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_both_engines_agree_and_the_scale_costs_no_second_evaluation(lcm: Path) -> None:
    onnx, plain = (Pipeline.from_pretrained(lcm, engine=engine) for engine in ("onnx", "torch"))
    pictures = {}
    for guidance in (1.0, 8.5):
        pictures[guidance] = onnx(PROMPTS, seed=[1, 2], **call(guidance)).images
        expected = plain(PROMPTS, seed=[1, 2], **call(guidance)).images
        np.testing.assert_allclose(pictures[guidance], expected, atol=1e-3)
    assert np.abs(pictures[1.0] - pictures[8.5]).max() > 0.02
    rows, network = [], plain.network
    plain.network = lambda x, time, condition: rows.append(len(x)) or network(x, time, condition)
    plain(PROMPTS, seed=[1, 2], batch=2, **call(8.5))
    assert rows == [2] * 4


def test_it_goes_through_a_single_file(lcm: Path, tmp_path: Path) -> None:
    file, _ = convert(lcm, tmp_path / "one.safetensors")
    back, _ = convert(file, tmp_path / "back")
    expected = Pipeline.from_pretrained(lcm)(PROMPTS, seed=[1, 2], **call(8.5)).images
    for place in (file, back):
        found = Pipeline.from_pretrained(place)
        assert found.terms.sampler == "lcm"
        np.testing.assert_allclose(found(PROMPTS, seed=[1, 2], **call(8.5)).images, expected, atol=TOLERANCE)


def test_what_it_cannot_do_is_one_line(lcm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="know no negative prompt"):
        Pipeline.from_pretrained(lcm, engine="torch")(PROMPTS, negative_prompt="rain", **call(5.0))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for side in (30, 32):
        Image.new("RGB", (side, side), "red").save(pictures / f"{side}.png")
    with pytest.raises(InputError, match="is guidance-distilled"):
        finetune(pictures, base=lcm, out=tmp_path / "mine", caption="a thing")
