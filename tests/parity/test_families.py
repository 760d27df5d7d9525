"""Stable Diffusion 2 and XL make diffusers' pictures; the original layout's names are those diffusers' readers know."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen import InputError, Pipeline
from latentgen.checkpoint import CLIP, save_pipeline
from latentgen.checkpoint.keys import Tie, from_diffusers
from latentgen.diffusion.noise import Noise
from tests.conftest import CONTEXT, SCHEDULE

TOLERANCE = 2e-3  # in [0, 1]
DDIM = {"_class_name": "DDIMScheduler", **SCHEDULE}


def tower(tokenizer: Any, width: int, projected: bool = False) -> Any:
    """A random CLIP text tower with OpenCLIP's activation."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def padded_with_word_0(tokenizer: Any) -> Any:
    """As OpenCLIP pads, and so the folders of Stable Diffusion 2 and of XL's second tower."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = "!"
    return other


@pytest.fixture(scope="module")
def xl(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion XL folder, as we save it."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    words = parts["tokenizer"]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=16 + 20,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    ).eval()
    return save_pipeline(
        tmp_path_factory.mktemp("xl") / "xl",
        tokenizer=words,
        text_encoder=tower(words, 16),
        tokenizer_2=padded_with_word_0(words),
        text_encoder_2=tower(words, 20, projected=True),
        vae=parts["vae"],
        unet=unet,
        scheduler_config={**DDIM, "_class_name": "EulerDiscreteScheduler"},
    )


@pytest.fixture(scope="module")
def two(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 2 folder: v-prediction, OpenCLIP's form of text tower."""
    torch.manual_seed(2)
    words = padded_with_word_0(parts["tokenizer"])
    given = {**parts, "tokenizer": words, "text_encoder": tower(words, 16)}
    config = {**DDIM, "prediction_type": "v_prediction"}
    return save_pipeline(tmp_path_factory.mktemp("two") / "two", **given, scheduler_config=config)


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
