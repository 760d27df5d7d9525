"""The U-Net stage: the noise in a latent, told from its caption (Ho et al. 2020; Rombach et al. 2022, equation 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentgen.diffusion.denoiser import Condition
from latentgen.diffusion.loss import Density, at_density, denoising_loss
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import Schedule
from latentgen.models.network import attend_plainly, unet_network
from latentgen.training.captions import CaptionTable
from latentgen.training.draw import VALIDATION, Draw
from latentgen.training.near import Near

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

VALIDATION_ROUNDS = 4  # each held-out picture is tried at so many times, spread evenly


@dataclass(frozen=True)
class Latents:
    """Encoded pictures as the U-Net sees them: (N, 2, C, h, w), mean and std of each posterior, scaled."""

    moments: np.ndarray

    def sample(self, items: np.ndarray, eps: Tensor) -> Tensor:
        """Latents (B, C, h, w) from standard normal eps, where eps lives."""
        chosen = self._near.take(items, eps.device).float()
        return chosen[:, 0] + chosen[:, 1] * eps

    def shape(self, items: np.ndarray) -> tuple[int, ...]:
        """(C, h, w) of these items."""
        return self.moments.shape[2:]

    def parts(self, most: int) -> list[np.ndarray]:
        """All items, in parts of about `most` that have one shape."""
        count = len(self.moments)
        return np.array_split(np.arange(count), max(1, -(-count // most)))

    @cached_property
    def _near(self) -> Near:
        return Near(self.moments)


@dataclass(frozen=True)
class BucketLatents(Latents):
    """Latents of several shapes: item i is row `row[i]` of the moments `shaped[bucket[i]]`; `moments` is empty."""

    shaped: tuple[np.ndarray, ...]
    bucket: np.ndarray
    row: np.ndarray

    def sample(self, items: np.ndarray, eps: Tensor) -> Tensor:
        """Of items of one bucket: latents (B, C, h, w) from standard normal eps, where eps lives."""
        return self._own(items).sample(self.row[items], eps)

    def shape(self, items: np.ndarray) -> tuple[int, ...]:
        """(C, h, w) of items of one bucket."""
        return self._own(items).moments.shape[2:]

    def parts(self, most: int) -> list[np.ndarray]:
        """All items, bucket after bucket."""
        own = [items for n in range(len(self.shaped)) if len(items := np.flatnonzero(self.bucket == n))]
        return [part for items in own for part in np.array_split(items, -(-len(items) // most))]

    def _own(self, items: np.ndarray) -> Latents:
        (bucket,) = set(self.bucket[items].tolist())
        return self._latents[bucket]

    @cached_property
    def _latents(self) -> tuple[Latents, ...]:
        return tuple(Latents(own) for own in self.shaped)


def sampled(versions: Sequence[Latents], items: np.ndarray, draw: Draw, device: torch.device) -> Tensor:
    """Latents (B, C, h, w) of items of one shape, of each in one of its versions, all alike likely."""
    first = versions[0]
    eps = draw.normal(*first.shape(items), device=device)
    if len(versions) == 1:
        return first.sample(items, eps)
    chosen = (draw.uniform().numpy() * len(versions)).astype(np.int64)
    found = torch.empty_like(eps)
    for number in np.unique(chosen).tolist():
        rows = torch.from_numpy(np.flatnonzero(chosen == number))
        found[rows.to(device)] = versions[number].sample(items[rows.numpy()], eps[rows.to(device)])
    return found


@dataclass(frozen=True)
class Denoising:
    """What is learned: on which schedule, as which prediction, with which weight; how often without its caption.

    times, times_mean, times_std: how the times trained at are spread (`diffusion.loss.times`); judged are even ones.
    """

    schedule: Schedule
    prediction: Prediction
    weighting: str = "simple"
    caption_dropout: float = 0.1
    times: Density = "uniform"
    times_mean: float | None = None
    times_std: float | None = None


@dataclass(frozen=True)
class TextStates:
    """Encoded captions: (texts + 1, L, D) float16 in the order of the table, the empty caption last."""

    states: np.ndarray

    def rows(self, numbers: np.ndarray, device: torch.device) -> Condition:
        """The conditions of some captions, float32."""
        return Condition(self._near.take(numbers, device).float())

    @property
    def empty(self) -> int:
        """The number of the empty caption."""
        return len(self.states) - 1

    @cached_property
    def _near(self) -> Near:
        return Near(self.states)


class DenoiseObjective:
    """Latents and text states come from a cache; the posterior is sampled anew each time.

    others: the same latents, of the pictures varied (`data.variants`).
    """

    splits = True
    judge = ("validation_loss", -1)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        denoising: Denoising,
        latents: Latents,
        captions: CaptionTable,
        states: TextStates,
        weights: np.ndarray,
        held_out: tuple[Latents, TextStates],
        accelerator: Accelerator,
        *,
        sheet: Callable[[], Image.Image | None],
        others: Sequence[Latents] = (),
    ) -> None:
        self.module = unet.to(accelerator.device)
        if accelerator.device.type == "cpu":
            attend_plainly(unet)
        self.weights = weights
        self.buckets = latents.bucket if isinstance(latents, BucketLatents) else None
        self._network = unet_network(unet)
        self._what, self._versions, self._captions, self._states = denoising, (latents, *others), captions, states
        self._held_out, self._accelerator, self._sheet = held_out, accelerator, sheet

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """Equation 3 of Rombach et al. 2022, for the prediction chosen; some captions empty (Ho & Salimans 2022)."""
        device = self._accelerator.device
        x0 = sampled(self._versions, items, draw, device)
        chosen = self._captions.choose(items, draw.uniform().numpy())
        dropped = draw.uniform().numpy() < self._what.caption_dropout
        condition = self._states.rows(np.where(dropped, self._states.empty, chosen), device)
        times = self._times(draw.stratified()).to(device)
        losses = self._losses(x0, condition, times, draw.normal(*x0.shape[1:], device=device))
        return {"loss": losses.mean()}

    def _times(self, u: Tensor) -> Tensor:
        what = self._what
        return at_density(u, what.times, schedule=what.schedule, mean=what.times_mean, std=what.times_std)

    def _losses(self, x0: Tensor, condition: Condition, times: Tensor, eps: Tensor) -> Tensor:
        what = self._what
        x0, eps = (value.contiguous(memory_format=torch.channels_last) for value in (x0, eps))
        return denoising_loss(
            self._network, what.schedule, what.prediction, x0, condition, times, eps, weighting=what.weighting
        )

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """The same loss on held-out pairs, with fixed noise at fixed times, with the caption and without."""
        self.module.eval()
        latents, states = self._held_out
        device = self._accelerator.device
        told, untold = [], []
        for turn in range(VALIDATION_ROUNDS):
            for number, part in enumerate(latents.parts(64)):
                draw = Draw(turn, number, len(part), stream=VALIDATION)
                shape = latents.shape(part)
                x0 = latents.sample(part, draw.normal(*shape, device=device))
                eps, times = draw.normal(*shape, device=device), draw.stratified().clamp(1e-6, 1 - 1e-6).to(device)
                told.append(self._losses(x0, states.rows(part, device), times, eps))
                if turn == 0:
                    empty = np.full(len(part), states.empty)
                    untold.append(self._losses(x0, states.rows(empty, device), times, eps))
        with_caption, first = torch.cat(told), torch.cat(told[: len(untold)])
        gain = float((torch.cat(untold) - first).mean())
        return {"validation_loss": float(with_caption.mean()), "caption_gain": gain}

    def sheet(self) -> Image.Image | None:
        """Fixed prompts from fixed noise."""
        self.module.eval()
        return self._sheet()
