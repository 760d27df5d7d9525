"""The decoder stage: the decoder learns to decode latents as a U-Net draws them, not only as the encoder writes them.

A U-Net's latents lie a little beside those of any picture, and a decoder that never saw such latents makes smears of
them. So it is trained on, the encoder as it is, so that latents and U-Net stay valid: on latents with noise added (as
conditions are in Ho et al. 2022, "Cascaded diffusion models", section 4), and on latents that the U-Net drew itself,
from part of the way, where the picture that should come out is known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from latentgen.diffusion.denoiser import Condition, Denoiser
from latentgen.diffusion.guidance import guided
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule.plan import Plan
from latentgen.models.network import unet_network
from latentgen.training.autoencoder import Adversary, AdversaryLoss
from latentgen.training.captions import CaptionTable
from latentgen.training.clip import to_unit
from latentgen.training.denoise import Latents, TextStates
from latentgen.training.draw import VALIDATION, Draw
from latentgen.training.near import Near
from latentgen.training.sheet import contact_sheet, from_unit

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

WALK = 8  # steps of the whole way from noise, of which the last are walked
JUDGED, SHOWN = 64, 12  # held-out pictures that are drawn to judge by; of them on the sheet


@dataclass(frozen=True)
class Drawing:
    """How latents are made that are not quite the encoder's.

    noise: the largest standard deviation of what is added to them. drawn: how often the U-Net draws them instead, from
    a time of up to `depth` (1 is noise) and with this `guidance`.
    """

    noise: float = 0.3
    drawn: float = 0.5
    depth: float = 0.5
    guidance: float = 4.0

    @property
    def most(self) -> int:
        """The most steps of `WALK` that are walked."""
        return max(1, round(self.depth * WALK))


@dataclass(frozen=True)
class Painter:
    """A trained U-Net, frozen, and how it is sampled."""

    unet: UNet2DConditionModel
    plan: Plan
    guidance: float

    @torch.no_grad()
    def draw(self, x0: Tensor, condition: Condition, empty: Condition, steps: int, eps: Tensor) -> Tensor:
        """Latents (B, C, h, w) noised to where the last `steps` of `WALK` begin, and drawn from there anew."""
        knots = self.plan.knots(WALK)[WALK - steps :]
        alpha, sigma = (float(part) for part in self.plan.schedule.marginal(float(knots[0])))
        denoiser = Denoiser(unet_network(self.unet, gradients=False), self.plan.schedule, self.plan.prediction)
        denoise = guided(denoiser, condition, empty, scale=max(self.guidance, 1.0))
        x = alpha * x0 + sigma * eps
        for step in SAMPLERS["dpmpp-2m"](denoise, x, knots, self.plan.schedule.marginal, None):
            x = step.x
        return x


class DecoderObjective:
    """L1 between a picture and what is decoded of its latents, noised or drawn anew, and an adversary if asked for;
    of the networks that are saved only the decoder learns.
    """

    splits = True
    judge = ("psnr_drawn", 1)

    def __init__(
        self,
        vae: AutoencoderKL,
        painter: Painter,
        latents: Latents,
        captions: CaptionTable,
        states: TextStates,
        pixels: np.ndarray,
        weights: np.ndarray,
        held_out: tuple[Latents, TextStates, np.ndarray],
        accelerator: Accelerator,
        *,
        drawing: Drawing,
        terms: AdversaryLoss,
    ) -> None:
        device = accelerator.device
        self.vae = vae.to(device)
        self._before = copy.deepcopy(self.vae).eval().requires_grad_(False)
        nets: dict[str, nn.Module] = {"decoder": vae.decoder}
        if vae.post_quant_conv is not None:
            nets["into"] = vae.post_quant_conv
        self._terms, self._adversary = terms, Adversary().to(device) if terms.adversary else None
        if self._adversary is not None:
            nets["adversary"] = self._adversary
        self.module = nn.ModuleDict(nets).requires_grad_(True)
        for net in nets.values():
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights = weights
        self._painter, self._drawing, self._device = painter, drawing, device
        self._latents, self._captions, self._states, self._near = latents, captions, states, Near(pixels)
        self._held_out = held_out
        self._painted: Tensor | None = None

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """-> "loss" and its terms. Which rows are drawn anew, and with what noise, is told by the draw; for how many
        steps, to all of them.
        """
        shape = self._latents.shape(items)
        x0 = self._latents.sample(items, draw.normal(*shape, device=self._device))
        chosen = self._captions.choose(items, draw.uniform().numpy())
        eps = draw.normal(*shape, device=self._device)
        latents = x0 + self._drawing.noise * draw.uniform(1, 1, 1).to(self._device) * eps
        rows = np.flatnonzero(draw.uniform().numpy() < self._drawing.drawn)
        steps = 1 + int(draw.shared(1)[0] * self._drawing.most)
        if len(rows):
            self._painter.unet.eval()
            told, empty = (
                self._states.rows(numbers, self._device)
                for numbers in (chosen[rows], np.full(len(rows), self._states.empty))
            )
            latents[rows] = self._painter.draw(x0[rows], told, empty, steps, eps[rows]).to(latents.dtype)
        found, real = _decoded(self.vae, latents).float(), to_unit(self._near.take(items, self._device), self._device)
        terms = {"l1": (found - real).abs().mean()}
        loss = terms["l1"]
        if self._adversary is not None:
            contest = self._adversary.contest(real, found)
            loss = loss + contest.loss(self._terms, draw.step)
            terms |= contest.terms()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """PSNR in dB of held-out pictures through the means of their latents, and through latents drawn anew.

        gain: what the second is above the decoder's that came.
        """
        self.module.eval()
        latents, _, pixels = self._held_out
        plain = []
        for part in latents.parts(64):
            means = latents.sample(part, torch.zeros(len(part), *latents.shape(part), device=self._device))
            plain.append(self._errors(self.vae, means, pixels[part]))
        drawn, before = (
            _psnr(self._errors(vae, self._judged_latents(), pixels[self._judged])) for vae in (self.vae, self._before)
        )
        return {"psnr": _psnr(torch.cat(plain)), "psnr_drawn": drawn, "gain": drawn - before}

    @torch.no_grad()
    def sheet(self) -> Image.Image | None:
        """Held-out pictures; below each their latents, drawn anew, through the decoder as it came, and as it is."""
        self.module.eval()
        latents = self._judged_latents()[:SHOWN]
        shown = [to_unit(self._held_out[2][self._judged[:SHOWN]], self._device)]
        shown += [_decoded(vae, latents).float() for vae in (self._before, self.vae)]
        return contact_sheet([from_unit(picture) for row in shown for picture in row], columns=len(latents))

    @property
    def _judged(self) -> np.ndarray:
        count = len(self._held_out[2])
        return np.unique(np.linspace(0, count - 1, min(JUDGED, count)).astype(int))

    @torch.no_grad()
    def _judged_latents(self) -> Tensor:
        """Of the judged pictures, drawn from `depth` with fixed noise; once, as the U-Net does not change."""
        if self._painted is None:
            latents, states, _ = self._held_out
            rows = self._judged
            draw = Draw(0, 0, len(rows), stream=VALIDATION)
            x0, eps = (draw.normal(*latents.shape(rows), device=self._device) for _ in range(2))
            x0 = latents.sample(rows, x0)
            told, empty = (states.rows(numbers, self._device) for numbers in (rows, np.full(len(rows), states.empty)))
            self._painter.unet.eval()
            self._painted = self._painter.draw(x0, told, empty, self._drawing.most, eps)
        return self._painted

    def _errors(self, vae: AutoencoderKL, latents: Tensor, pixels: np.ndarray) -> Tensor:
        """(B,) mean squared error of pictures in [0, 1]."""
        found = _decoded(vae, latents).float().clamp(-1, 1)
        return ((found - to_unit(pixels, self._device)) / 2).square().mean(dim=(1, 2, 3))


def _decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] from latents as a U-Net has them."""
    inner = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    found: Tensor = vae.decode(inner.contiguous(memory_format=torch.channels_last)).sample
    return found


def _psnr(errors: Tensor) -> float:
    return float(-10 * errors.log10().mean())
