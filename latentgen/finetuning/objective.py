"""What fine-tuning descends: the denoising loss on the new pictures and, for DreamBooth, on the prior as well."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from latentgen.diffusion.denoiser import Condition, Network
from latentgen.diffusion.loss import Density, at_density, denoising_loss
from latentgen.diffusion.schedule.plan import Plan
from latentgen.models.text import TextEncoder, TwoTextEncoders, whole_sizes
from latentgen.training.captions import CaptionTable
from latentgen.training.denoise import Latents, sampled
from latentgen.training.draw import VALIDATION, Draw

TRIED = 96  # denoisings that a validation is made of, at the least
AT_ONCE = 32
TOLD_NOTHING = 0.1  # of the prior: what guidance starts from is kept too


class Conditions(Protocol):
    """Texts by number, the empty one last, as what the U-Net is told."""

    empty: int

    def rows(self, numbers: np.ndarray) -> Condition:
        """The conditions (B, …) of some texts."""


class KeptConditions:
    """Encoded once: for text encoders that are not trained."""

    def __init__(self, text: TextEncoder | TwoTextEncoders, texts: Sequence[str], size: int) -> None:
        parts = [encode(text, texts[start : start + 64]) for start in range(0, len(texts), 64)]
        self._states = torch.cat([part.states.half() for part in parts if part.states is not None])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        self._pooled = torch.cat(pooled) if pooled else None
        self._size, self.empty = size, len(texts) - 1

    def rows(self, numbers: np.ndarray) -> Condition:
        """From the kept states."""
        chosen = torch.from_numpy(np.asarray(numbers)).to(self._states.device)
        states = self._states[chosen].float()
        if self._pooled is None:
            return Condition(states)
        pooled = self._pooled[chosen]
        return Condition(states, pooled=pooled, sizes=whole_sizes(self._size, self._size, pooled))


class LiveConditions:
    """Encoded at every step: for a text encoder, or a word of it, that is trained."""

    def __init__(self, text: TextEncoder | TwoTextEncoders, texts: Sequence[str], size: int) -> None:
        self._text, self._texts, self._size = text, list(texts), size
        self.empty = len(texts) - 1

    def rows(self, numbers: np.ndarray) -> Condition:
        """From the encoder as it is now."""
        condition = encode(self._text, [self._texts[number] for number in numbers])
        if condition.pooled is None:
            return condition
        return replace(condition, sizes=whole_sizes(self._size, self._size, condition.pooled))


def encode(text: TextEncoder | TwoTextEncoders, texts: Sequence[str]) -> Condition:
    """Texts as conditions (B, …), the empty one as what guidance starts from: of Stable Diffusion XL all zeros."""
    condition = text.encode(texts)
    if isinstance(text, TextEncoder):
        return condition
    nothing = text.empty(condition)
    assert condition.states is not None and condition.pooled is not None
    assert nothing.states is not None and nothing.pooled is not None
    said = torch.tensor([each != "" for each in texts], device=nothing.states.device)
    states = torch.where(said[:, None, None], condition.states, nothing.states)
    return Condition(states, torch.where(said[:, None], condition.pooled, nothing.pooled))


@dataclass(frozen=True)
class Kept:
    """Pictures as latents, and the number of each one's text: (N, 2, C, h, w) moments, (N,)."""

    latents: Latents
    texts: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Times:
    """The density that times are trained at (`diffusion.loss.at_density`); judged are even ones."""

    density: Density = "uniform"
    mean: float | None = None
    std: float | None = None

    def drawn(self, draw: Draw, plan: Plan, device: torch.device) -> Tensor:
        """One for each row (B,), spread evenly over the density."""
        u = draw.stratified()
        return at_density(u, self.density, schedule=plan.schedule, mean=self.mean, std=self.std).to(device)


class FinetuneObjective:
    """The denoising loss (Rombach et al. 2022, equation 3) of a network whose trained weights `module` holds.

    pictures: latents of the same pictures in one version or several (`data.variants`), the first as they are.
    prior: trained on beside the pictures, its loss times prior_weight (Ruiz et al. 2023, equation 2). teacher: the
    starting weights' network, whose answers on the prior's noised pictures are then kept to instead of the pictures
    (Li & Hoiem 2016), a tenth of them told nothing. watched: the starting weights' renderings on which forgetting is
    measured. held: pictures the validation is made on.
    """

    splits = True
    judge = ("validation_loss", -1)

    def __init__(
        self,
        module: nn.Module,
        network: Network,
        plan: Plan,
        pictures: Sequence[Latents],
        captions: CaptionTable,
        conditions: Conditions,
        *,
        held: Kept,
        watched: Kept,
        prior: Kept | None,
        prior_weight: float,
        teacher: Network | None,
        caption_dropout: float,
        weighting: str,
        times: Times,
        accelerator: Accelerator,
        sheet: Callable[[], Image.Image | None],
    ) -> None:
        self.module = module
        self.weights = np.ones(len(pictures[0].moments))
        self._network, self._plan, self._pictures, self._captions = network, plan, pictures, captions
        self._conditions, self._held, self._watched, self._prior = conditions, held, watched, prior
        self._prior_weight, self._dropout, self._weighting = prior_weight, caption_dropout, weighting
        self._accelerator, self._sheet, self._times, self._teacher = accelerator, sheet, times, teacher

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """On the items, some captions empty; and on as many pictures of the prior."""
        device = self._accelerator.device
        x0 = sampled(self._pictures, items, draw, device)
        shape = x0.shape[1:]
        numbers = self._captions.choose(items, draw.uniform().numpy())
        numbers = np.where(draw.uniform().numpy() < self._dropout, self._conditions.empty, numbers)
        times, eps = self._times.drawn(draw, self._plan, device), draw.normal(*shape, device=device)
        if self._prior is None:
            return {"loss": self._losses(x0, numbers, times, eps).mean()}
        rows = (draw.uniform().numpy() * len(self._prior)).astype(np.int64)
        kept = self._prior.latents.sample(rows, draw.normal(*shape, device=device))
        told = self._prior.texts[rows]
        later, other = self._times.drawn(draw, self._plan, device), draw.normal(*shape, device=device)
        if self._teacher is not None:
            told = np.where(draw.uniform().numpy() < TOLD_NOTHING, self._conditions.empty, told)
        both = self._losses(
            torch.cat([x0, kept]),
            np.concatenate([numbers, told]),
            torch.cat([times, later]),
            torch.cat([eps, other]),
            taught=len(rows),
        )
        new, old = both[: len(items)].mean(), both[len(items) :].mean()
        return {"loss": new + self._prior_weight * old, "new": new, "prior": old}

    def _losses(self, x0: Tensor, texts: np.ndarray, times: Tensor, eps: Tensor, taught: int = 0) -> Tensor:
        x0, eps = (value.contiguous(memory_format=torch.channels_last) for value in (x0, eps))
        given = (
            self._network,
            self._plan.schedule,
            self._plan.prediction,
            x0,
            self._conditions.rows(texts),
            times,
            eps,
        )
        return denoising_loss(*given, weighting=self._weighting, teacher=self._teacher, taught=taught)

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """The loss on held-out pictures and on what the starting weights rendered, with fixed noise at fixed times."""
        self.module.eval()
        return {"validation_loss": self._mean(self._held), "prior_loss": self._mean(self._watched)}

    def _mean(self, kept: Kept) -> float:
        device, shape = self._accelerator.device, kept.latents.moments.shape[2:]
        items = np.tile(np.arange(len(kept)), max(2, -(-TRIED // len(kept))))
        found = []
        for number, part in enumerate(np.array_split(items, -(-len(items) // AT_ONCE))):
            draw = Draw(0, number, len(part), stream=VALIDATION)
            x0 = kept.latents.sample(part, draw.normal(*shape, device=device))
            eps = draw.normal(*shape, device=device)
            found.append(self._losses(x0, kept.texts[part], Times().drawn(draw, self._plan, device), eps))
        return float(torch.cat(found).mean())

    def sheet(self) -> Image.Image | None:
        """Fixed prompts from fixed noise, above them what the starting weights made of them."""
        self.module.eval()
        return self._sheet()
