"""Which style a picture is in: a linear probe over what the judge's first layers see, and over its colours.

Second moments of feature maps are what style transfer takes for style (Gatys et al. 2016, eq. 3): they know strokes,
shading and edges, and not where things are. The judge's last features, trained to forget them, are poor at it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from latentgen.checkpoint import read_json
from latentgen.durable import sha256
from latentgen.errors import InputError
from latentgen.evaluation.efficientnet import EfficientNetLite0
from latentgen.evaluation.encoders import Encoder, default_judge

LEARNT_FROM = 4000  # training pictures that the probe is fitted to, at most
MAPS = (0, 1, 3)  # the stem's output, and those of the first and the third block
COLOURS = 8  # parts of each channel in the histogram
GROUPS = (528, 136, 300, COLOURS**3)  # features of each map, and of the histogram
RIDGE = 1.0


def style_encoder() -> Encoder:
    """(B, 3, H, W) in [0, 1] -> (B, 1476): three second moments of the default judge's maps, and the colours' roots."""
    folder = default_judge()
    file = folder / "model.safetensors"
    config = read_json(folder / "config.json")
    network, size = EfficientNetLite0.load(file), int(config.get("image_size", 128))

    def see(pixels: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(255 * pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        x, found = network.stem(x), []
        for turn in range(max(MAPS) + 1):
            if turn in MAPS:
                found.append(second_moments(x))
            if turn < max(MAPS):
                x = network.blocks[turn](x)
        return torch.cat([*found, colours(pixels)], 1)

    return Encoder("style", f"style 1 {sha256(file)}", see)


def second_moments(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C(C + 1)/2): the mean of the products of two channels, over places."""
    flat = maps.flatten(2)
    gram = flat @ flat.transpose(1, 2) / flat.shape[2]
    rows, columns = torch.triu_indices(gram.shape[1], gram.shape[1])
    return gram[:, rows, columns]


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 512): the square roots of how much of the picture each part of RGB has."""
    parts = (pixels * 255).long() * COLOURS // 256
    index = (parts[:, 0] * COLOURS + parts[:, 1]) * COLOURS + parts[:, 2]
    hot = torch.zeros(len(pixels), COLOURS**3)
    ones = torch.ones(len(pixels), index[0].numel())
    return (hot.scatter_add_(1, index.flatten(1), ones) / ones.shape[1]).sqrt()


@dataclass(frozen=True)
class StyleProbe:
    """One-against-all ridge regression; every group of features weighs the same. `styles` in the order of `weights`."""

    styles: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, styles: np.ndarray, groups: tuple[int, ...] = GROUPS) -> "StyleProbe":
        """features (N, D), styles (N,). Raises InputError for fewer than two styles."""
        names = np.unique(styles)
        if len(names) < 2:
            raise InputError("a probe of style needs two styles or more")
        x = features.astype(np.float64)
        mean, spread = x.mean(0), x.std(0)
        parts = np.split(spread, np.cumsum(groups)[:-1])
        scale = np.concatenate([1 / ((part + 1e-3 * part.mean() + 1e-12) * len(part) ** 0.5) for part in parts])
        x = (x - mean) * scale
        wanted = np.where(styles[:, None] == names, 1.0, -1.0)
        bias = wanted.mean(0)
        if len(x) > x.shape[1]:
            weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (wanted - bias))
        else:  # the same by the other side, which is smaller (Saunders et al. 1998)
            weights = x.T @ np.linalg.solve(x @ x.T + RIDGE * np.eye(len(x)), wanted - bias)
        return cls(names, mean, scale, weights, bias)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The style of each row, (N,)."""
        scores = (features - self.mean) * self.scale @ self.weights + self.bias
        return np.asarray(self.styles[scores.argmax(1)])
