"""What may be asked of the U-Net's middle beside the noise: likeness to the CLIP image tower, and spread.

Both act on the features of its middle block while it trains, and leave nothing in the weights that are saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentgen.data.kept import key_of
from latentgen.errors import InputError
from latentgen.training.cache import Items, content_of
from latentgen.training.clip import gather, to_unit
from latentgen.training.denoise import DenoiseObjective
from latentgen.training.draw import Draw
from latentgen.training.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import CLIPVisionModel


@dataclass(frozen=True)
class FeatureTerms:
    """Weights of the two terms; 0 is off. temperature: tau of the dispersive loss."""

    align: float = 0.0
    disperse: float = 0.0
    temperature: float = 0.5


class MiddleFeatures:
    """Keeps what the middle block of a U-Net gave last: (B, C, h, w)."""

    def __init__(self, unet: Any) -> None:
        self.last: Tensor | None = None
        unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.last = output

    def take(self) -> Tensor:
        """The features of the last pass, once."""
        kept, self.last = self.last, None
        assert kept is not None, "the U-Net has not run"
        return kept


class FeatureObjective(DenoiseObjective):
    """The U-Net's own loss and what is asked of its middle.

    targets: the tower's patches of every picture (N, T, D) where `terms.align` is on.
    """

    def __init__(self, unet: Any, *given: Any, terms: FeatureTerms, targets: np.ndarray | None, **named: Any) -> None:
        """Raises InputError for alignment beside a U-Net in parts, whose gradients alone are exchanged."""
        if terms.align and is_sharded(unet):
            raise InputError("align does not work on a U-Net in parts (FSDP); set align = 0 or turn FSDP off")
        super().__init__(unet, *given, **named)
        self._terms, self._middle = terms, MiddleFeatures(unet)
        self.splits = not terms.disperse  # which looks at the batch as a whole
        self._alignment: Alignment | None = None
        if terms.align:
            assert targets is not None, "alignment needs the tower's patches"
            channels = unet.config.block_out_channels[-1]
            self._alignment = Alignment(channels, targets).to(self._accelerator.device)
            self.module = nn.ModuleDict({"unet": unet, "alignment": self._alignment})

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """-> "loss" and its terms."""
        denoising = super().loss(items, draw)["loss"]
        middle = self._middle.take()
        found = {"denoising": denoising}
        if self._alignment is not None:
            found["align"] = self._alignment(middle, items).mean()
        if self._terms.disperse:
            found["disperse"] = dispersion(gather(middle, self._accelerator), self._terms.temperature)
        weighed = [getattr(self._terms, name) * found[name] for name in ("align", "disperse") if name in found]
        return {"loss": torch.stack([denoising, *weighed]).sum(), **found}


class Alignment(nn.Module):
    """1 - cosine of the middle's features, through a small network of their own, and the tower's patches.

    Representation alignment (Yu et al. 2025, REPA, equation 8), with our own CLIP's image tower as the teacher.
    """

    def __init__(self, channels: int, targets: np.ndarray) -> None:
        super().__init__()
        width = targets.shape[-1]
        self.net = nn.Sequential(
            nn.Conv2d(channels, 2 * width, 1), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 1), nn.SiLU(),
            nn.Conv2d(2 * width, width, 1),
        )  # fmt: skip
        self._targets = targets

    def forward(self, middle: Tensor, items: np.ndarray) -> Tensor:
        """(B, C, h, w), the pictures' numbers (B,) -> (B,). Where the grids differ the tower's is resized."""
        goal = torch.from_numpy(self._targets[items].astype(np.float32)).to(middle.device)
        side = round(goal.shape[1] ** 0.5)
        grid = goal.transpose(1, 2).reshape(*goal.shape[::2], side, side)
        if grid.shape[-2:] != middle.shape[-2:]:
            grid = F.interpolate(grid, size=middle.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        return 1 - F.cosine_similarity(self.net(middle), grid, dim=1).mean(dim=(1, 2))


def dispersion(middle: Tensor, temperature: float = 0.5) -> Tensor:
    """How close the features of a batch lie together, a scalar: log mean exp(-|z_i - z_j|² / (D tau)).

    The dispersive loss in its l2 form (Wang & He 2025, equation 6); distances are a mean over the D features.
    """
    flat = middle.flatten(1).float()
    squared = torch.cdist(flat, flat).square() / flat.shape[1]
    return torch.logsumexp(-squared.flatten() / temperature, 0) - 2 * float(np.log(len(flat)))


@torch.no_grad()
def tower_patches(
    tower: CLIPVisionModel, pixels: np.ndarray, device: torch.device, rows: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """(n, T, D) float16: the tower's states of each picture's T patches after the last layer, the class token not."""
    tower = tower.to(device).eval()
    chosen = np.arange(len(pixels)) if rows is None else rows
    for start in range(0, len(chosen), 128):
        states = tower(pixel_values=to_unit(pixels[chosen[start : start + 128]], device)).last_hidden_state
        yield states[:, 1:].half().cpu().numpy()


def patch_items(tower: CLIPVisionModel, pixels: np.ndarray, device: torch.device) -> Items:
    """The patches of pictures (N, H, W, 3), by pixels and tower."""
    config = tower.config

    def parts(rows: np.ndarray) -> Iterator[np.ndarray]:
        return tower_patches(tower, pixels, device, rows)

    shape = ((config.image_size // config.patch_size) ** 2, config.hidden_size)
    return Items(f"patches-{content_of(tower)[:12]}", [key_of(picture) for picture in pixels], shape, np.float16, parts)
