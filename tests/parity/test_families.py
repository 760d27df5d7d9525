"""Stable Diffusion 2 and XL make diffusers' pictures; the original layout's names are those diffusers' readers know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen import InputError, Pipeline
from latentgen.checkpoint import CLIP
from latentgen.checkpoint.keys import Tie, from_diffusers
from latentgen.diffusion.noise import Noise
from tests.conftest import CONTEXT

TOLERANCE = 2e-3  # in [0, 1]


def noise(seeds: list[int], height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(Noise(seeds).initial((4, height // 4, width // 4)))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("negative", ["", "a yellow car"])
def test_xl_is_the_picture_of_diffusers(xl: Path, guidance: float, negative: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    theirs = StableDiffusionXLPipeline.from_pretrained(xl)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red apple", "the green frog"]
    given = {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "np", "height": 32, "width": 48}
    given |= {"latents": noise([3, 4], 32, 48), "negative_prompt": [negative] * 2}
    if not negative:
        given.pop("negative_prompt")
    expected = theirs(prompts, **given).images
    found = Pipeline.from_pretrained(xl)(prompts, **given).images
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_stable_diffusion_2_is_the_picture_of_diffusers(two: Path, guidance: float) -> None:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(two)
    theirs.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "np", "height": 32, "width": 32}
    given |= {"latents": noise([6], 32, 32)}
    expected = theirs("a blue bird", negative_prompt="rain", **given).images
    found = Pipeline.from_pretrained(two)("a blue bird", negative_prompt="rain", **given).images
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def original(part: str, state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A network's tensors under the original layout's names."""
    found: dict[str, Any] = {}
    ties: list[Tie] = from_diffusers(part, list(state), config, CLIP)
    for tie in ties:
        assert tie.form in ("same", "flat"), tie  # nothing is stacked or turned in CLIP's form
        value = state[tie.diffusers]
        found[tie.ldm] = value[:, :, None, None] if tie.form == "flat" else value
    return found


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_diffusers_reads_the_names_of_the_original_layout_back(part: str) -> None:
    """Networks of four levels, as Stable Diffusion has them; diffusers' own reader is the truth."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as reader

    if part == "unet":
        network: Any = UNet2DConditionModel(
            block_out_channels=(8, 8, 16, 16), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=16
        )
        convert: Callable[..., Any] = reader.convert_ldm_unet_checkpoint
        prefix = "model.diffusion_model."
    else:
        network = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=8,
        )
        convert, prefix = reader.convert_ldm_vae_checkpoint, "first_stage_model."
    state, config = network.state_dict(), dict(network.config)
    written = original(part, state, config)
    read = convert({f"{prefix}{name}": value for name, value in written.items()}, config)
    assert set(read) == set(state)
    for name, value in read.items():
        torch.testing.assert_close(value.reshape(state[name].shape), state[name], rtol=0, atol=0)


def test_xl_embeddings_need_the_pooled_ones(xl: Path) -> None:
    with pytest.raises(InputError, match="pooled_prompt_embeds"):
        Pipeline.from_pretrained(xl)(prompt_embeds=torch.zeros(1, CONTEXT, 36), num_inference_steps=2)
