"""What the one training loop asks of a pixel model: a loss, figures on held-out pictures, a sheet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from latentgen.pixels.model import PixelModel
from latentgen.training.draw import VALIDATION, Draw

ROUNDS, ROWS = 4, 64  # held-out pictures are tried at so many times each, so many at once


@dataclass(frozen=True)
class LabelledPictures:
    """(N, C, H, W) uint8, and the class of each (N,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, items: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """x0 (B, C, H, W) float32 in [−1, 1], on 256 levels, and labels (B,)."""
        x0 = torch.from_numpy(np.ascontiguousarray(self.pixels[items])).to(device).float() / 127.5 - 1
        return x0, torch.from_numpy(self.labels[items]).to(device)


class PixelObjective:
    """The family's own loss, each picture with its class but for a part of them. judged: which of `held` (N,)."""

    splits = True
    judge = ("validation_loss", -1)

    def __init__(
        self,
        model: PixelModel,
        pictures: LabelledPictures,
        held: LabelledPictures,
        judged: np.ndarray,
        weights: np.ndarray,
        accelerator: Accelerator,
        *,
        label_dropout: float,
        sheet: Callable[[], Image.Image],
    ) -> None:
        self.module: nn.Module = model.to(accelerator.device)
        self.weights = weights
        self._model, self._pictures, self._held, self._judged = model, pictures, held, judged
        self._dropout, self._accelerator, self._sheet = label_dropout, accelerator, sheet

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """The family's loss at times spread evenly over the batch; some classes untold (Ho & Salimans 2022)."""
        device = self._accelerator.device
        x0, labels = self._pictures.rows(items, device)
        untold = (draw.uniform() < self._dropout).to(device)
        labels = torch.where(untold, torch.full_like(labels, self._model.classes), labels)
        times = draw.stratified().clamp(1e-6, 1 - 1e-6).to(device)
        return {"loss": self._model.losses(x0, labels, times, draw.normal(*x0.shape[1:], device=device)).mean()}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """The same loss on held-out pictures, fixed noise at fixed times, with the class and without."""
        self.module.eval()
        device, told, untold = self._accelerator.device, [], []
        items = self._judged
        for turn in range(ROUNDS):
            for number, part in enumerate(np.array_split(items, max(1, -(-len(items) // ROWS)))):
                draw = Draw(turn, number, len(part), stream=VALIDATION)
                x0, labels = self._held.rows(part, device)
                times, eps = (
                    draw.stratified().clamp(1e-6, 1 - 1e-6).to(device),
                    draw.normal(*x0.shape[1:], device=device),
                )
                told.append(self._model.losses(x0, labels, times, eps))
                if turn == 0:
                    none = torch.full_like(labels, self._model.classes)
                    untold.append(self._model.losses(x0, none, times, eps))
        with_class, first = torch.cat(told), torch.cat(told[: len(untold)])
        return {
            "validation_loss": float(with_class.mean()),
            "class_gain": float((torch.cat(untold) - first).mean()),
        }

    @torch.no_grad()
    def sheet(self) -> Image.Image | None:
        """Every class from fixed noise."""
        self.module.eval()
        return self._sheet()
