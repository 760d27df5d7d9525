"""Networks of labelled diffusion in pixels: made, read back, and behind the one signature of all networks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentgen.diffusion.denoiser import Condition, Network
from latentgen.errors import InputError
from latentgen.models.convnext import ConvNextUNet
from latentgen.models.loading import quiet

KINDS = {"resnet": UNet2DModel, "convnext": ConvNextUNet}


def pixel_unet(
    blocks: str,
    *,
    channels: Sequence[int],
    layers: int,
    side: int,
    picture_channels: int,
    classes: int,
    patch: int = 1,
    head_width: int = 32,
    learned_variance: bool = False,
) -> Any:
    """A U-Net of "resnet" blocks (diffusers' UNet2DModel, attention in its middle) or of "convnext" ones.

    patch: the network sees squares of so many pixels as channels of one place (Hoogeboom et al. 2023, section 3.2).
    classes: one more is embedded than there are, for pictures whose class is not told. learned_variance: twice the
    channels out. Raises InputError for a side that does not divide.
    """
    least = patch * 2 ** (len(channels) - 1)
    if side % least:
        raise InputError(
            f"pictures of {side} px do not divide by {least} (patch {patch}, {len(channels)} levels); "
            "give fewer channels, a smaller patch, or another size"
        )
    inside = picture_channels * patch**2
    form: dict[str, Any] = {
        "in_channels": inside,
        "out_channels": inside * (2 if learned_variance else 1),
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "num_class_embeds": classes + 1,
    }
    if blocks == "resnet":
        form |= {
            "sample_size": side // patch,
            "down_block_types": ("DownBlock2D",) * len(channels),
            "up_block_types": ("UpBlock2D",) * len(channels),
            "norm_num_groups": math.gcd(8, *channels),
            "attention_head_dim": math.gcd(head_width, channels[-1]),
        }
    return KINDS[blocks](**form).to(memory_format=torch.channels_last)


def load_pixel_unet(folder: Path) -> Any:
    """The U-Net that `save_pretrained` left in a folder. Raises InputError where it is not whole."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind = next(kind for kind in KINDS.values() if kind.__name__ == name)
        with quiet():
            unet = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, StopIteration) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder} holds no U-Net that can be read: {reason}") from error
    return unet.to(memory_format=torch.channels_last)


def label_network(unet: Any, patch: int = 1) -> Network:
    """A labelled U-Net as a Network: x (B, C, H, W), time (B,), labels (B,) -> (B, C or 2C, H, W)."""

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert condition.labels is not None, "a labelled network needs labels"
        places = pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last)
        out = unet(places, time, condition.labels, return_dict=False)[0]
        return pixel_shuffle(out, patch)

    return network
