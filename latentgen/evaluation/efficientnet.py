"""EfficientNet-Lite0 as a judge of pictures: 1,280 features of a network that saw ImageNet and nothing of ours.

Tan & Le 2019, without squeeze-and-excitation and with ReLU6, as the Lite models are. Padding is TensorFlow's SAME: at
stride 2 the odd pixel goes below and to the right. The file's names are `scripts/build_judge.py`'s.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from latentgen.errors import InputError

FEATURES = 1280
STAGES = (  # repeats, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """A convolution with SAME padding, its batch norm, and ReLU6 unless `linear`."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outer, eps=1e-3)
        self.kernel, self.stride, self.linear = kernel, stride, linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, H, W) -> (B, outer, ceil(H / stride), ceil(W / stride))."""
        if self.kernel > 1:
            (top, bottom), (left, right) = (same_padding(side, self.kernel, self.stride) for side in x.shape[-2:])
            x = F.pad(x, (left, right, top, bottom))
        x = self.norm(self.conv(x))
        return x if self.linear else F.relu6(x)

    def fuse(self) -> None:
        """Fold the norm into the convolution: the same output to rounding, for less work."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Block(nn.Module):
    """An inverted bottleneck (Sandler et al. 2018), with a shortcut where shape allows."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.expand = ConvNorm(inner, wide) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, outer, linear=True)
        self.shortcut = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, H, W) -> (B, outer, H / stride, W / stride)."""
        out = self.project(self.depthwise(x if self.expand is None else self.expand(x)))
        return x + out if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """Pixels to features; no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        blocks, inner = [], 32
        for repeats, kernel, stride, expansion, outer in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(inner, outer, kernel, stride if repeat == 0 else 1, expansion))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inner, FEATURES)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W), (x − 127) / 128 for x in 0 to 255 -> (B, 1280), the mean over places."""
        return self.head(self.blocks(self.stem(pixels))).mean((2, 3))

    @classmethod
    def load(cls, file: Path) -> "EfficientNetLite0":
        """From a safetensors file, in float32, norms folded, in eval mode. Raises InputError where it does not fit."""
        network = cls().eval()
        try:
            network.load_state_dict({name: value.float() for name, value in load_file(file).items()}, strict=False)
            missing = set(network.state_dict()) - set(load_file(file))
        except Exception as error:  # safetensors' own kinds, and torch's of shapes
            raise InputError(f"{file} holds no EfficientNet-Lite0: {str(error).splitlines()[-1].strip()}") from error
        missing = {name for name in missing if not name.endswith("num_batches_tracked")}
        if missing:
            raise InputError(f"{file} holds no EfficientNet-Lite0: it lacks {min(missing)}")
        for module in list(network.modules()):
            if isinstance(module, ConvNorm):
                module.fuse()
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.requires_grad_(False)


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Before and after, as TensorFlow's SAME has it: ceil(side / stride) outputs, the odd pixel after."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2
