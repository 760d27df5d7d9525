"""A U-Net of ConvNeXt blocks (Liu et al. 2022), told the time and a class: small pictures, no attention."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class ConvNextBlock(nn.Module):
    """x + scale·W2(gelu(W1(norm(depthwise(x) + told)))) (Liu et al. 2022, figure 4), `told` being time and class.

    (B, C, h, w), (B, T) -> (B, C, h, w). scale: one number a channel (their layer scale), small at first.
    """

    def __init__(self, width: int, told: int, kernel: int = 7, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.told = nn.Linear(told, width)
        self.norm = nn.GroupNorm(1, width)
        self.expand = nn.Conv2d(width, expansion * width, 1)
        self.project = nn.Conv2d(expansion * width, width, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """The block's residual added to x."""
        hidden = self.norm(self.depthwise(x) + self.told(told)[:, :, None, None])
        return x + self.scale * self.project(nn.functional.gelu(self.expand(hidden)))


class ConvNextUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Down by 2 x 2 convolutions, up by nearest neighbour, a skip at every level; `layers` blocks at each.

    Called as diffusers' UNet2DModel: (B, C, h, w), time (B,), class_labels (B,) -> a tuple of one (B, C', h, w).
    h and w must divide by 2^(levels − 1). The last convolution starts at 0.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        kernel: int = 7,
        num_class_embeds: int = 2,
    ) -> None:
        super().__init__()
        widths, told = list(block_out_channels), 4 * block_out_channels[0]
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], told)
        self.class_embedding = nn.Embedding(num_class_embeds, told)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)

        def blocks(width: int) -> nn.ModuleList:
            return nn.ModuleList(ConvNextBlock(width, told, kernel) for _ in range(layers_per_block))

        self.down = nn.ModuleList(blocks(width) for width in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.middle = blocks(widths[-1])
        self.merge = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in widths)
        self.up = nn.ModuleList(blocks(width) for width in widths)
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.norm_out = nn.GroupNorm(1, widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, **_: Any) -> tuple[Tensor]:
        """The raw output."""
        told = self.time_embedding(self.time_proj(timestep).to(sample.dtype)) + self.class_embedding(class_labels)
        told = nn.functional.silu(told)
        x, skips = self.conv_in(sample), []
        for level, blocks in enumerate(self.down):
            x = self.shrink[level - 1](x) if level else x
            x = _through(blocks, x, told)
            skips.append(x)
        x = _through(self.middle, x, told)
        for level in reversed(range(len(self.up))):
            if level < len(self.widen):
                x = self.widen[level](nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = _through(self.up[level], self.merge[level](torch.cat([x, skips[level]], dim=1)), told)
        return (self.conv_out(nn.functional.silu(self.norm_out(x))),)


def _through(blocks: Any, x: Tensor, told: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, told)
    return x
