"""What the shapes in an LDM file tell of its networks, and what the family tells that shapes cannot."""

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from latentgen.checkpoint.keys import CLIP, OPENCLIP, prefix
from latentgen.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPENCLIP_LAYERS = 24  # of ViT-H, of which Stable Diffusion 2 runs all but the last
HEAD = 64  # width of an attention head in every CLIP, and in the U-Nets of Stable Diffusion 2 and XL


class Family(Enum):
    """Which Stable Diffusion a file is, by its text encoders."""

    SD1 = "Stable Diffusion 1"
    SD2 = "Stable Diffusion 2"
    SDXL = "Stable Diffusion XL"

    @classmethod
    def of(cls, shapes: Shapes) -> "Family":
        """SDXL has `conditioner.`, SD2 OpenCLIP's tower, SD1 OpenAI's."""
        if any(name.startswith("conditioner.embedders.") for name in shapes):
            return cls.SDXL
        return cls.SD2 if any(name.startswith("cond_stage_model.model.") for name in shapes) else cls.SD1

    @property
    def pipeline(self) -> str:
        """diffusers' class for it."""
        return "StableDiffusionXLPipeline" if self is Family.SDXL else "StableDiffusionPipeline"


def configs_of(shapes: Shapes, family: Family, place: Path) -> dict[str, dict[str, Any]]:
    """The config of every network, in diffusers' and transformers' words, and the scheduler's.

    Raises InputError where the file lacks a network, or what tells of one.
    """
    _require_networks(shapes, family, place)
    try:
        configs = {"unet": _unet(shapes, family), "vae": _vae(shapes, family), "scheduler": _scheduler(shapes, family)}
        if family is Family.SD1:
            configs["text_encoder"] = _clip(shapes, "cond_stage_model.transformer.")
        elif family is Family.SD2:
            configs["text_encoder"] = _openclip(shapes, "cond_stage_model.model.")
        else:
            configs["text_encoder"] = _clip(shapes, "conditioner.embedders.0.transformer.")
            configs["text_encoder_2"] = _openclip(shapes, "conditioner.embedders.1.model.", projected=True)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise InputError(f"{place} is not whole: a {family.value} file with {error} missing; fetch it again") from error
    return configs


def _require_networks(shapes: Shapes, family: Family, place: Path) -> None:
    """Raise InputError for a file without an autoencoder or a text encoder, as people prune them."""
    second = family is Family.SDXL
    wanted = [
        ("vae", CLIP, "autoencoder"),
        ("text_encoder", OPENCLIP if family is Family.SD2 else CLIP, "text encoder"),
    ]
    wanted += [("text_encoder_2", OPENCLIP, "second text encoder")] if second else []
    starts = {prefix(part, second, tower): what for part, tower, what in wanted}
    missing = [what for start, what in starts.items() if not any(name.startswith(start) for name in shapes)]
    if missing:
        raise InputError(f"{place} is not whole: it holds no {' and no '.join(missing)}; name one that was not pruned")


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that stands where the pattern's group is."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not found:
        raise KeyError(pattern.replace(r"(\d+)\.", "0").replace("\\", ""))
    return max(found) + 1


def _unet(shapes: Shapes, family: Family) -> dict[str, Any]:
    start = re.escape(UNET)
    blocks = _count(shapes, start + r"input_blocks\.(\d+)\.")
    downs = sorted(
        int(match[1]) for name in shapes if (match := re.match(start + r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    layers = (downs[0] if downs else blocks) - 1
    levels = len(downs) + 1
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    channels = [shapes[f"{UNET}input_blocks.{block}.0.out_layers.3.weight"][0] for block in firsts]
    attends = [f"{UNET}input_blocks.{block}.1.norm.weight" in shapes for block in firsts]
    depths = [
        _count(shapes, start + rf"input_blocks\.{block}\.1\.transformer_blocks\.(\d+)\.") if attend else 0
        for block, attend in zip(firsts, attends, strict=True)
    ]
    middle = _count(shapes, start + r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    width = shapes[f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    heads = [8] * levels if family is Family.SD1 else [max(1, channel // HEAD) for channel in channels]
    config: dict[str, Any] = {
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": width,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "use_linear_projection": len(shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2,
        "sample_size": {Family.SD1: 64, Family.SD2: 96, Family.SDXL: 128}[family],
    }
    if any(depth > 1 for depth in depths) or middle > 1:
        # a level without attention has a depth too in diffusers' config; the middle takes the last level's
        config["transformer_layers_per_block"] = [depth or 1 for depth in depths]
    if (told := shapes.get(f"{UNET}time_embed.cond_proj.weight")) is not None:
        config["time_cond_proj_dim"] = told[1]
    if family is Family.SDXL:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes[f"{UNET}label_emb.0.0.weight"][1],
        }
    return config


def _vae(shapes: Shapes, family: Family) -> dict[str, Any]:
    start = re.escape(VAE)
    levels = _count(shapes, start + r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [shapes[f"{VAE}encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "layers_per_block": _count(shapes, start + r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes[f"{VAE}post_quant_conv.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": f"{VAE}encoder.mid.attn_1.q.weight" in shapes,
        "sample_size": 1024 if family is Family.SDXL else 512,
        "scaling_factor": 0.13025 if family is Family.SDXL else 0.18215,
    }


def _clip(shapes: Shapes, start: str) -> dict[str, Any]:
    inner = start if f"{start}embeddings.token_embedding.weight" in shapes else f"{start}text_model."
    words, width = shapes[f"{inner}embeddings.token_embedding.weight"]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "max_position_embeddings": shapes[f"{inner}embeddings.position_embedding.weight"][0],
        "num_hidden_layers": _count(shapes, re.escape(inner) + r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD),
        "intermediate_size": shapes[f"{inner}encoder.layers.0.mlp.fc1.weight"][0],
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        **_marks(words),
    }


def _openclip(shapes: Shapes, start: str, projected: bool = False) -> dict[str, Any]:
    """projected: the whole tower and its projection are used; else its last layer is not, and may be there or not.

    Whole is a tower of OPENCLIP_LAYERS, and one of another depth where its projection is there.
    """
    words, width = shapes[f"{start}token_embedding.weight"]
    layers = _count(shapes, re.escape(start) + r"transformer\.resblocks\.(\d+)\.")
    whole = layers == OPENCLIP_LAYERS or (layers != OPENCLIP_LAYERS - 1 and f"{start}text_projection" in shapes)
    return {
        "vocab_size": words,
        "hidden_size": width,
        "max_position_embeddings": shapes[f"{start}positional_embedding"][0],
        "num_hidden_layers": layers - (whole and not projected),
        "num_attention_heads": max(1, width // HEAD),
        "intermediate_size": shapes[f"{start}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "hidden_act": "gelu",
        "projection_dim": shapes[f"{start}text_projection"][1] if projected else 512,
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        **_marks(words),
    }


def _marks(words: int) -> dict[str, Any]:
    """The start and end marks are the last two words of CLIP's vocabulary."""
    return {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}


def _scheduler(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Stable Diffusion's table. SD2 at 768 px predicts v, and no shape tells it from the base model, which does not."""
    v = family is Family.SD2 or "v_pred" in shapes
    name = "EulerDiscreteScheduler" if family is Family.SDXL else "DDIMScheduler"
    if f"{UNET}time_embed.cond_proj.weight" in shapes:
        name = "LCMScheduler"  # consistency models are the ones that are told the guidance scale
    return {
        "_class_name": name,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v else "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "rescale_betas_zero_snr": "ztsnr" in shapes,
    }
