"""Single files of others say nothing of their networks: shapes and family tell, and the picture is the folder's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentgen import Pipeline
from latentgen.checkpoint import open_checkpoint, save_pipeline
from latentgen.checkpoint.shapes import Family
from latentgen.convert import convert
from tests.conftest import CONTEXT, SCHEDULE, padded_with_word_0

HEAD = 64  # the narrowest tower that shapes can tell the heads of


def tower(tokenizer: Any, openclip: bool = False, projected: bool = False, layers: int = 3) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HEAD,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu" if openclip else "quick_gelu",
        projection_dim=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def networks(family: Family, words: Any, layers: int = 3) -> dict[str, Any]:
    """Random networks of a family, small where its shapes leave a choice."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(4)
    told: dict[str, Any] = {"attention_head_dim": 8, "cross_attention_dim": HEAD}
    parts: dict[str, Any] = {"tokenizer": words, "text_encoder": tower(words, layers=layers)}
    if family is Family.SD2:
        told |= {"attention_head_dim": (1, 2), "use_linear_projection": True}
        parts = {"tokenizer": padded_with_word_0(words), "text_encoder": tower(words, openclip=True, layers=layers)}
    if family is Family.SDXL:
        told |= {"attention_head_dim": (1, 2), "use_linear_projection": True, "cross_attention_dim": 2 * HEAD}
        told |= {"transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"}
        told |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 24 + 6 * 256}
        parts["tokenizer_2"] = padded_with_word_0(words)
        parts["text_encoder_2"] = tower(words, openclip=True, projected=True)
    first = "DownBlock2D" if family is Family.SDXL else "CrossAttnDownBlock2D"
    last = "CrossAttnDownBlock2D" if family is Family.SDXL else "DownBlock2D"
    unet = UNet2DConditionModel(
        sample_size={Family.SD1: 64, Family.SD2: 96, Family.SDXL: 128}[family],
        block_out_channels=(64, 128),
        down_block_types=(first, last),
        up_block_types=(last.replace("Down", "Up"), first.replace("Down", "Up")),
        layers_per_block=1,
        **told,
    )
    with torch.no_grad():  # so that the prompt matters
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                weight.mul_(4)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        scaling_factor=0.13025 if family is Family.SDXL else 0.18215,
    )
    return {**parts, "unet": unet.eval(), "vae": vae.eval()}


@pytest.fixture(scope="module")
def plain(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(a family's folder, the single file of it whose header says nothing); layers: of the first text tower."""
    made: dict[Any, tuple[Path, Path]] = {}

    def make(family: Family, layers: int = 3) -> tuple[Path, Path]:
        if (family, layers) not in made:
            place = tmp_path_factory.mktemp("plain")
            config: dict[str, Any] = {**SCHEDULE, "_class_name": "DDIMScheduler"}
            if family is Family.SDXL:
                config = {**SCHEDULE, "_class_name": "EulerDiscreteScheduler"}
            if family is Family.SD2:
                config["prediction_type"] = "v_prediction"
            given = networks(family, parts["tokenizer"], layers)
            folder = save_pipeline(place / "folder", **given, scheduler_config=config)
            file, _ = convert(folder, place / "one.safetensors")
            made[family, layers] = folder, strip(file)
        return made[family, layers]

    return make


def strip(file: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """The file without what its header says of us."""
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    return file


def picture(place: Path, **options: Any) -> np.ndarray:
    call = {"negative_prompt": "rain!", "seed": 5, "num_inference_steps": 3, "guidance_scale": 4.0}
    pipe = Pipeline.from_pretrained(place, engine="torch", **options)
    return pipe("the green frog", height=32, width=24, output_type="np", **call).images


@pytest.mark.parametrize("family", Family)
def test_a_file_that_says_nothing_is_read_by_its_shapes(
    plain: Callable[..., tuple[Path, Path]], family: Family
) -> None:
    folder, file = plain(family)
    whole, alone = open_checkpoint(folder), open_checkpoint(file)
    assert set(whole.weights) == set(alone.weights)
    for part in (*alone.weights, "scheduler"):
        here, there = alone.config(part), whole.config(part)
        assert {key: there.get(key, value) for key, value in here.items() if key not in UNSAID} == {
            key: value for key, value in here.items() if key not in UNSAID
        }, part
    expected = picture(folder)
    assert expected.std() > 0.03
    np.testing.assert_array_equal(picture(file), expected)


UNSAID = ("projection_dim", "pad_token_id", "sample_size")  # what neither shapes nor pictures depend on


# --- Stable Diffusion 2 runs OpenCLIP's tower without its last layer, which a file may hold or not


@pytest.mark.parametrize("layers", [3, 23])
def test_a_tower_without_its_last_layer_loses_none(plain: Callable[..., tuple[Path, Path]], layers: int) -> None:
    folder, file = plain(Family.SD2, layers)
    assert open_checkpoint(file).config("text_encoder")["num_hidden_layers"] == layers
    np.testing.assert_array_equal(picture(file), picture(folder))


@pytest.mark.parametrize(("layers", "projection"), [(3, True), (23, True), (23, False)])
def test_a_whole_tower_is_run_without_its_last_layer(
    plain: Callable[..., tuple[Path, Path]], tmp_path: Path, layers: int, projection: bool
) -> None:
    folder, file = plain(Family.SD2, layers)

    def whole(tensors: dict[str, torch.Tensor]) -> None:
        start = "cond_stage_model.model."
        last = f"{start}transformer.resblocks.{layers - 1}."
        for name in [name for name in tensors if name.startswith(last)]:
            tensors[name.replace(f".{layers - 1}.", f".{layers}.")] = torch.ones_like(tensors[name])
        if projection:
            tensors |= {f"{start}text_projection": torch.ones(HEAD, HEAD), f"{start}logit_scale": torch.ones(())}

    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    strip(copy, whole)
    assert open_checkpoint(copy, tokenizer=folder).config("text_encoder")["num_hidden_layers"] == layers
    np.testing.assert_array_equal(picture(copy, tokenizer=folder), picture(folder))
