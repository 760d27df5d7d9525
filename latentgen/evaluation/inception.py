"""Inception v3 as the Fréchet Inception Distance takes it (Szegedy et al. 2016; Heusel et al. 2017): 2,048 features.

The network of 2015 that TensorFlow's authors trained, which papers' figures are of: its average pools leave the padding
out of the count, and its last block pools by the maximum. Names are those of the weights as the field converted them
(pt_inception-2015-12-05). Pictures are resized as TensorFlow 1 did it: bilinear, without half pixels and antialiasing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latentgen.errors import InputError

SIDE, FEATURES = 299, 2048
Layer = tuple[str, int, tuple[int, int], int]  # name, channels out, kernel, stride


def _conv(name: str, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> Layer:
    return name, channels, kernel if isinstance(kernel, tuple) else (kernel, kernel), stride


def _chain(name: str, *layers: tuple[int, int | tuple[int, int]], last: int = 1) -> list[Layer]:
    """name_1, name_2, …; the last with a stride."""
    count = len(layers)
    return [_conv(f"{name}_{k}", *layer, last if k == count else 1) for k, layer in enumerate(layers, 1)]


WIDE, HIGH = (1, 7), (7, 1)
# A block is its branches, one below the other; an empty one is the pool as it is. Each is what figure 5, 6 or 7 of the
# paper draws, or a reduction.
Branches = list[list[Layer]]


def _a(pool: int) -> Branches:
    five, three = _chain("branch5x5", (48, 1), (64, 5)), _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return [[_conv("branch1x1", 64)], five, three, [_conv("branch_pool", pool)]]


def _c(width: int) -> Branches:
    seven = _chain("branch7x7", (width, 1), (width, WIDE), (192, HIGH))
    double = _chain("branch7x7dbl", (width, 1), (width, HIGH), (width, WIDE), (width, HIGH), (192, WIDE))
    return [[_conv("branch1x1", 192)], seven, double, [_conv("branch_pool", 192)]]


def _e() -> Branches:
    """Its second and third branch part at the end; what they part from is given with each half."""
    three, double = [_conv("branch3x3_1", 384)], _chain("branch3x3dbl", (448, 1), (384, 3))
    halves = [[*three, _conv(f"branch3x3_2{side}", 384, kernel)] for side, kernel in (("a", (1, 3)), ("b", (3, 1)))]
    halves += [
        [*double, _conv(f"branch3x3dbl_3{side}", 384, kernel)] for side, kernel in (("a", (1, 3)), ("b", (3, 1)))
    ]
    return [[_conv("branch1x1", 320)], *halves, [_conv("branch_pool", 192)]]


B: Branches = [[_conv("branch3x3", 384, 3, 2)], _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3), last=2), []]
D: Branches = [
    _chain("branch3x3", (192, 1), (320, 3), last=2),
    _chain("branch7x7x3", (192, 1), (192, WIDE), (192, HIGH), (192, 3), last=2),
    [],
]
BLOCKS: Mapping[str, tuple[Branches, str]] = {  # name -> its branches and how the last one pools
    "Mixed_5b": (_a(32), "mean"),
    "Mixed_5c": (_a(64), "mean"),
    "Mixed_5d": (_a(64), "mean"),
    "Mixed_6a": (B, "halve"),
    "Mixed_6b": (_c(128), "mean"),
    "Mixed_6c": (_c(160), "mean"),
    "Mixed_6d": (_c(160), "mean"),
    "Mixed_6e": (_c(192), "mean"),
    "Mixed_7a": (D, "halve"),
    "Mixed_7b": (_e(), "mean"),
    "Mixed_7c": (_e(), "most"),
}
STEM = {  # name -> channels out, kernel, stride, padding
    "Conv2d_1a_3x3": (32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3, 1, 1),
    "Conv2d_3b_1x1": (80, 1, 1, 0),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
}
POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")  # followed by a maximum of 3 x 3 at stride 2
UNUSED = ("fc.", "AuxLogits.")  # of the classifier


class ConvNorm(nn.Module):
    """A convolution, its batch norm and ReLU."""

    def __init__(self, inner: int, outer: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outer, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, H, W) -> (B, outer, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.ModuleDict):
    """Branches side by side."""

    def __init__(self, inner: int, branches: Branches, pool: str) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        self.outer = 0
        for branch in branches:
            width = inner
            for name, outer, kernel, stride in branch:
                padding = (0, 0) if stride > 1 else (kernel[0] // 2, kernel[1] // 2)
                if name not in self:
                    self[name] = ConvNorm(width, outer, kernel, stride, padding)
                width = outer
            self.outer += width

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, H, W) -> (B, outer, H', W')."""
        done: dict[str, Tensor] = {}
        found = []
        for branch in self.branches:
            y = self._pooled(x) if not branch or branch[0][0] == "branch_pool" else x
            for name, *_ in branch:
                y = done[name] if name in done else self[name](y)
                done[name] = y
            found.append(y)
        return torch.cat(found, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pool == "halve" else F.max_pool2d(x, 3, 1, 1)


class InceptionV3(nn.ModuleDict):
    """Pictures (B, 3, H, W) in [0, 1] -> features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__(dict(_layers()))

    @classmethod
    def load(cls, file: Path) -> "InceptionV3":
        """From a .safetensors file. Raises InputError, one line, for one of another network."""
        network = cls()
        try:
            weights = {name: value for name, value in load_file(file).items() if not name.startswith(UNUSED)}
            missing = network.load_state_dict(weights, strict=False)
        except Exception as error:  # safetensors' own kinds, and torch's of shapes
            raise InputError(f"{file} holds no Inception v3: {str(error).splitlines()[-1].strip()}") from error
        gone = [name for name in missing.missing_keys if not name.endswith("num_batches_tracked")]
        if gone or missing.unexpected_keys:
            other = (gone or missing.unexpected_keys)[0]
            how = "is missing" if gone else "is too much"
            raise InputError(f"{file} holds no Inception v3 as FID takes it: {other} {how}")
        return network.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """As the class says."""
        x = (resized(255 * pixels, SIDE) - 128) / 128
        for name, layer in self.items():
            x = layer(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))


def _layers() -> Iterator[tuple[str, nn.Module]]:
    width = 3
    for name, (outer, kernel, stride, padding) in STEM.items():
        yield name, ConvNorm(width, outer, (kernel, kernel), stride, (padding, padding))
        width = outer
    for name, (branches, pool) in BLOCKS.items():
        block = Block(width, branches, pool)
        yield name, block
        width = block.outer


def resized(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side), bilinear as TensorFlow 1's `resize_bilinear` with align_corners off."""
    rows, columns = (_between(length, side, x) for length in x.shape[2:])
    return rows @ x @ columns.T


def _between(length: int, side: int, like: Tensor) -> Tensor:
    """(side, length): which two places each new one lies between, and how near to each."""
    place = torch.arange(side, dtype=torch.float64) * (length / side)
    low = place.floor().long()
    share = place - low
    weights = torch.zeros(side, length, dtype=torch.float64)
    every = torch.arange(side)
    weights[every, low] += 1 - share
    weights[every, (low + 1).clamp(max=length - 1)] += share
    return weights.to(like)
