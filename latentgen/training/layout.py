"""The layout stage: a caption's last text states learn to tell, small and blurred, the picture it goes with.

CLIP agrees on which caption belongs to which picture, and need not know where in it anything is. A U-Net that starts
from pure noise has nothing but the text to go by there: what it has to find is a regression from captions to pictures,
and it is a costly place to learn one. So the text encoder learns it first. Its last `grid`² places are padding for all
but the longest captions, and see the whole caption; each gives one patch of the picture as a thumbnail, through one
linear layer that is thrown away. Cross-attention reads them like any other states.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentgen.errors import InputError
from latentgen.training.captions import CaptionTable
from latentgen.training.clip import to_unit, tokens
from latentgen.training.draw import Draw
from latentgen.training.near import Near
from latentgen.training.sheet import contact_sheet, from_unit

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

PATCH = 4  # pixels of the thumbnail along a patch's side
SHOWN, SIDE = 16, 64  # pictures on the sheet, and the side of each there


class LayoutObjective:
    """Squared error of thumbnails of variance 1, told from the text states; the other states stay near what they were.

    grid: patches along a side. keep: weight of the squared distance between the states of the first places and those
    of the encoder as it came. caption_dropout: how often the caption is empty; its thumbnail is then the mean.
    """

    splits = True
    judge = ("validation_loss", -1)

    def __init__(
        self,
        text: CLIPTextModel,
        words: CLIPTokenizer,
        pixels: np.ndarray,
        captions: CaptionTable,
        held_out: tuple[np.ndarray, Sequence[str]],
        weights: np.ndarray,
        accelerator: Accelerator,
        *,
        grid: int = 4,
        keep: float = 0.02,
        caption_dropout: float = 0.1,
    ) -> None:
        """Raises InputError where the context has no room for the patches, or the pictures are smaller than them."""
        context, side = words.model_max_length, grid * PATCH
        if context - grid**2 < 4:
            raise InputError(
                f"a layout of {grid} x {grid} patches takes {grid**2} of the {context} places of a caption; "
                f"set context = {grid**2 + 4} or more in [tokenizer]"
            )
        if pixels.shape[1] < side:
            raise InputError(
                f"a layout of {grid} x {grid} patches is {side} pixels wide, the pictures are {pixels.shape[1]}; "
                "give a smaller grid in [layout]"
            )
        device = accelerator.device
        if device.type == "cpu":
            text.set_attn_implementation("eager")  # as in `ClipObjective`
        self._before = copy.deepcopy(text).to(device).eval().requires_grad_(False)
        text.requires_grad_(True)  # weights that were opened to render are frozen
        head = nn.Linear(text.config.hidden_size, 3 * PATCH**2)
        self.module = nn.ModuleDict({"text": text, "head": head}).to(device)
        self.weights = weights
        self._words, self._captions, self._held_out = words, captions, held_out
        self._accelerator, self._grid, self._keep, self._dropout = accelerator, grid, keep, caption_dropout
        self._ids = tokens(words, [*captions.texts, ""])
        self._near = Near(pixels)
        self._mean, self._scale = self._statistics()

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """-> "loss" and its two terms."""
        device = self._accelerator.device
        chosen = self._captions.choose(items, draw.uniform().numpy())
        dropped = draw.uniform().numpy() < self._dropout
        ids = self._ids[np.where(dropped, len(self._ids) - 1, chosen)].to(device)
        states = self.module["text"](ids).last_hidden_state
        found = self._told(states)
        layout = (found.float() - patches(self._thumbnails(self._near.take(items, device)), self._grid)).square().mean()
        if not self._keep:
            return {"loss": layout, "layout": layout}
        with torch.no_grad():
            before = self._before(ids).last_hidden_state
        first = states.shape[1] - self._grid**2
        drift = (states[:, :first].float() - before[:, :first].float()).square().mean()
        return {"loss": layout + self._keep * drift, "layout": layout, "drift": drift}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """The error on held-out pairs, and the part of their variance that it leaves out (R²)."""
        self.module.eval()
        pixels, texts = self._held_out
        errors, variances = [], []
        for rows in np.array_split(np.arange(len(texts)), max(1, -(-len(texts) // 128))):
            goal = patches(self._thumbnails(pixels[rows]), self._grid)
            errors.append((self._thumbnail_patches([texts[row] for row in rows]) - goal).square().mean((1, 2)))
            variances.append(goal.square().mean((1, 2)))
        error, variance = float(torch.cat(errors).mean()), float(torch.cat(variances).mean())
        return {"validation_loss": error, "explained": 1 - error / max(variance, 1e-12)}

    @torch.no_grad()
    def sheet(self) -> Image.Image | None:
        """Some held-out captions, as they are told, each below the picture it goes with."""
        self.module.eval()
        pixels, texts = self._held_out
        rows = np.linspace(0, len(texts) - 1, min(SHOWN, len(texts))).astype(int)
        told = unpatched(self._thumbnail_patches([texts[row] for row in rows]), self._grid) * self._scale + self._mean
        real = to_unit(pixels[rows], self._accelerator.device)
        pairs = [F.interpolate(part, (SIDE, SIDE), mode="bicubic", antialias=True) for part in (real, told)]
        pictures = [from_unit(picture) for part in pairs for picture in part]
        return contact_sheet(pictures, len(rows), [texts[row] for row in rows] * 2)

    def _told(self, states: Tensor) -> Tensor:
        found: Tensor = self.module["head"](states[:, -(self._grid**2) :])
        return found

    def _thumbnail_patches(self, texts: Sequence[str]) -> Tensor:
        ids = tokens(self._words, texts).to(self._accelerator.device)
        return self._told(self.module["text"](ids).last_hidden_state).float()

    def _thumbnails(self, pixels: np.ndarray | Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, side, side), mean 0 and variance 1 over the pictures trained on."""
        return (self._shrunk(pixels) - self._mean) / self._scale

    def _shrunk(self, pixels: np.ndarray | Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(to_unit(pixels, self._accelerator.device), self._grid * PATCH)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean (3, side, side) and one standard deviation about it."""
        total: Any = 0.0
        square, count = 0.0, len(self._near.array)
        for rows in np.array_split(np.arange(count), max(1, -(-count // 256))):
            small = self._shrunk(self._near.array[rows]).double()
            total, square = total + small.sum(0), square + float(small.square().sum())
        mean = total / count
        variance = square / (count * mean.numel()) - float(mean.square().mean())
        return mean.float(), mean.new_tensor(max(variance, 1e-6)).sqrt().float()


def patches(pictures: Tensor, grid: int) -> Tensor:
    """(B, C, g·p, g·p) -> (B, g², C·p²), row by row."""
    count, channels, side, _ = pictures.shape
    cut = pictures.reshape(count, channels, grid, side // grid, grid, side // grid)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, grid**2, -1)


def unpatched(found: Tensor, grid: int) -> Tensor:
    """The inverse of `patches`, for PATCH pixels and three channels."""
    cut = found.reshape(len(found), grid, grid, 3, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(found), 3, grid * PATCH, grid * PATCH)
