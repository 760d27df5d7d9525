"""The names of one tensor in both layouts: in the original one (LDM, Rombach et al. 2022) and in diffusers' folders.

A pipeline's networks lie side by side in one LDM file, under a prefix each. `from_ldm` and `from_diffusers` go the two
ways over one table of module names (`modules`), and say how a tensor's numbers lie in the file (`Form`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from latentgen.errors import InputError

# same: as it is. flat: a 1x1 convolution's (C, D, 1, 1) there, a linear layer's (C, D) here. transposed: (D, P) there,
# (P, D) here. third: rows of the query, key and value stacked there, apart here.
Form = Literal["same", "flat", "transposed", "third"]
CLIP, OPENCLIP = "clip", "openclip"  # the two text towers' forms: Radford et al. 2021 as OpenAI's, and as OpenCLIP's
EMA = "model_ema."  # a second, averaged U-Net of training runs: model_ema. and the dotted name without its dots
# What lies under a network's prefix in people's files besides the network: left by its training, or of CLIP's pictures.
_BESIDES = {"unet": (), "vae": ("loss.", EMA), OPENCLIP: ("visual.",)}
_BESIDES |= {CLIP: ("text_projection.", "logit_scale", "vision_model.", "visual_projection.")}


@dataclass(frozen=True)
class Tie:
    """One tensor under both names. third: which of the stacked thirds, where the form is "third"."""

    ldm: str
    diffusers: str
    form: Form = "same"
    third: int = 0


def prefix(part: str, second: bool, tower: str = CLIP) -> str:
    """Under which prefix a part's tensors lie in an LDM file; `second` for Stable Diffusion XL."""
    if part in ("unet", "vae"):
        return {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[part]
    inner = "transformer." if tower == CLIP else "model."
    if second:
        return f"conditioner.embedders.{int(part == 'text_encoder_2')}.{inner}"
    return f"cond_stage_model.{inner}"


def from_ldm(part: str, names: Iterable[str], config: Mapping[str, Any], tower: str = CLIP) -> list[Tie]:
    """The ties of a part whose LDM names, without the prefix, are given. Raises InputError for a name that is none."""
    return [tie for name in names for tie in _from_ldm(part, name, config, tower)]


def from_diffusers(part: str, names: Iterable[str], config: Mapping[str, Any], tower: str = CLIP) -> list[Tie]:
    """The ties of a part whose diffusers names are given. Raises InputError for a name the LDM layout has not."""
    table = {here: there for there, here in modules(part, config, tower).items()}
    return [_tie(part, _translated(part, name, table, "the original layout"), name, tower) for name in names]


def modules(part: str, config: Mapping[str, Any], tower: str = CLIP) -> dict[str, str]:
    """LDM module name -> diffusers module name; what lies deeper keeps its name."""
    if part == "unet":
        return dict(_unet(config))
    if part == "vae":
        return dict(_vae(config))
    return dict(_openclip(config)) if tower == OPENCLIP else {"text_model": "text_model"}


def ldm_layers(layers: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The names of a U-Net's layers in the LDM layout, without the prefix; what has no place there is left out.

    config: as diffusers' config.json of it. Empty for U-Nets whose blocks that layout does not know.
    """
    if not {"layers_per_block", "block_out_channels", "up_block_types"} <= set(config):
        return {}
    if not isinstance(config["layers_per_block"], int):
        return {}
    table = {here: there for there, here in modules("unet", config).items()}
    found = {}
    for layer in layers:
        with suppress(InputError):
            found[layer] = _translated("unet", layer, table, "the original layout")
    return found


def ema_name(name: str) -> str:
    """What a U-Net's tensor `model.NAME` is called in the averaged copy."""
    return EMA + name.removeprefix("model.").replace(".", "")


def _from_ldm(part: str, name: str, config: Mapping[str, Any], tower: str) -> Iterator[Tie]:
    if part.startswith("text_encoder") and name.endswith("position_ids"):
        return  # a table of 0, 1, 2, …
    if name.startswith(_BESIDES[tower if part.startswith("text_encoder") else part]):
        return
    stacked = re.fullmatch(r"(transformer\.resblocks\.\d+)\.attn\.in_proj_(weight|bias)", name)
    if tower == OPENCLIP and stacked:
        layer = modules(part, config, tower).get(stacked[1])
        if layer is not None:
            for third, letter in enumerate("qkv"):
                yield Tie(name, f"{layer}.self_attn.{letter}_proj.{stacked[2]}", "third", third)
        return
    if tower == OPENCLIP and (_beyond(name, config) or name in _unused(config)):
        return
    if tower == CLIP and part.startswith("text_encoder"):
        yield Tie(name, name if name.startswith("text_model.") else f"text_model.{name}")
        return
    yield _tie(part, name, _translated(part, name, modules(part, config, tower), "diffusers"), tower)


def _translated(part: str, name: str, table: Mapping[str, str], where: str) -> str:
    """`name` with the longest module name that the table knows replaced."""
    module, rest = name, ""
    while module not in table:
        module, dot, last = module.rpartition(".")
        rest = f".{last}{rest}"
        if not dot:
            raise InputError(f"{part}: {name} has no place in {where}; this is no Stable Diffusion network as known")
    return table[module] + rest


def _tie(part: str, ldm: str, here: str, tower: str) -> Tie:
    if part == "vae" and re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", ldm):
        return Tie(ldm, here, "flat")
    if tower == OPENCLIP and part.startswith("text_encoder"):
        stacked = re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", ldm)
        if stacked:
            return Tie(f"{stacked[1]}.in_proj_{stacked[3]}", here, "third", "qkv".index(stacked[2]))
        if ldm == "text_projection.weight":
            return Tie("text_projection", here, "transposed")
        if ldm == "text_projection":
            return Tie(ldm, "text_projection.weight", "transposed")
        if here == "text_model.embeddings.position_embedding" or ldm == "positional_embedding.weight":
            return Tie("positional_embedding", "text_model.embeddings.position_embedding.weight")
    return Tie(ldm, here)


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _unet(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Blocks count through in LDM, and by level in diffusers: each level's resnets, then what changes the size."""
    layers, count = int(config["layers_per_block"]), len(config["block_out_channels"])
    yield from {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "time_embed.cond_proj": "time_embedding.cond_proj",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }.items()
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(count):
        for layer in range(layers):
            block = 1 + level * (layers + 1) + layer
            yield from _resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}")
            yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}"
        if level < count - 1:
            yield f"input_blocks.{(level + 1) * (layers + 1)}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        attends = config["up_block_types"][level].startswith("CrossAttn")
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            yield from _resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{layer}"
        if level < count - 1:
            grown = f"output_blocks.{(level + 1) * (layers + 1) - 1}.{2 if attends else 1}.conv"
            yield grown, f"up_blocks.{level}.upsamplers.0.conv"


def _resnet(there: str, here: str) -> Iterator[tuple[str, str]]:
    for old, new in RESNET.items():
        yield f"{there}.{old}", f"{here}.{new}"


def _vae(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The decoder's levels count from the picture's side in LDM, from the latents' side in diffusers."""
    layers, count = int(config["layers_per_block"]), len(config["block_out_channels"])
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for side in ("encoder", "decoder"):
        for name in ("conv_in", "conv_out"):
            yield f"{side}.{name}", f"{side}.{name}"
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        for layer in (0, 1):
            yield from _vae_resnet(f"{side}.mid.block_{layer + 1}", f"{side}.mid_block.resnets.{layer}")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        for old, new in attention.items():
            yield f"{side}.mid.attn_1.{old}", f"{side}.mid_block.attentions.0.{new}"
    for level in range(count):
        for layer in range(layers):
            yield from _vae_resnet(
                f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}"
            )
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        there = f"decoder.up.{count - 1 - level}"
        for layer in range(layers + 1):
            yield from _vae_resnet(f"{there}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}")
        yield f"{there}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"


def _vae_resnet(there: str, here: str) -> Iterator[tuple[str, str]]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{there}.{name}", f"{here}.{name}"
    yield f"{there}.nin_shortcut", f"{here}.conv_shortcut"


def _openclip(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "token_embedding", "text_model.embeddings.token_embedding"
    yield "positional_embedding", "text_model.embeddings.position_embedding"
    yield "ln_final", "text_model.final_layer_norm"
    yield "text_projection", "text_projection"
    for layer in range(int(config["num_hidden_layers"])):
        there, here = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        yield there, here
        yield f"{there}.attn", f"{here}.self_attn"
        yield f"{there}.ln_1", f"{here}.layer_norm1"
        yield f"{there}.ln_2", f"{here}.layer_norm2"
        yield f"{there}.mlp.c_fc", f"{here}.mlp.fc1"
        yield f"{there}.mlp.c_proj", f"{here}.mlp.fc2"


def _beyond(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer lies behind the last one that is used: Stable Diffusion 2 stops before OpenCLIP's last."""
    layer = re.match(r"transformer\.resblocks\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= int(config["num_hidden_layers"])


def _unused(config: Mapping[str, Any]) -> set[str]:
    """What OpenCLIP needs to compare texts with pictures; Stable Diffusion 2 does without the projection too."""
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    return {"logit_scale", "attn_mask"} | (set() if projected else {"text_projection"})
