"""The VAE stage: pictures to small latents and back (Kingma & Welling 2014; Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentgen.training.clip import shift, to_unit
from latentgen.training.draw import VALIDATION, Draw
from latentgen.training.near import Near
from latentgen.training.sheet import contact_sheet, from_unit

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPVisionModel


@dataclass(frozen=True)
class AdversaryLoss:
    """Weights of an adversary's terms (`Contest`); `adversary_start` is the step of the run it is heard from."""

    adversary: float = 0.0
    adversary_start: int = 0
    matching: float = 0.0


@dataclass(frozen=True)
class AutoencoderLoss(AdversaryLoss):
    """Weights of the terms; each term is a mean over elements.

    equivariance: how often, as a part of the steps, latents are turned and made smaller and have to decode to the
    pictures turned and made smaller (Kouzelis et al. 2025, EQ-VAE): latents a diffusion model learns sooner.
    """

    kl: float = 5e-4
    perceptual: float = 0.1
    equivariance: float = 0.0


class Perceptual(nn.Module):
    """Distance of two pictures in the hidden states of the CLIP image tower trained before.

    The layers' states are compared at unit length, as LPIPS does (Zhang et al. 2018, equation 1, unit weights).
    """

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B,)."""
        with torch.no_grad():
            goal = self._states(wanted)
        distances = [(a - b).square().sum(-1).mean(-1) for a, b in zip(self._states(found), goal, strict=True)]
        return torch.stack(distances).mean(0)

    def _states(self, pixels: Tensor) -> list[Tensor]:
        hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [F.normalize(state, dim=-1) for state in hidden[1:]]


@dataclass(frozen=True)
class Contest:
    """Scalars: `own` is the hinge loss of an adversary itself, `fooled` how real it finds what is not, negated, and
    `matching` the L1 distance of real and found in its layers (Larsen et al. 2016; Wang et al. 2018, equation 4).
    """

    own: Tensor
    fooled: Tensor
    matching: Tensor

    def loss(self, weights: AdversaryLoss, step: int) -> Tensor:
        """What is descended by both sides, the networks that are judged listening once the step is reached."""
        started = float(step >= weights.adversary_start)
        return self.own + started * (weights.adversary * self.fooled + weights.matching * self.matching)

    def terms(self) -> dict[str, Tensor]:
        """For the log."""
        return {"adversary": self.own, "fooled": self.fooled, "matching": self.matching}


class Adversary(nn.Sequential):
    """Tells patches of real pictures from reconstructed ones (PatchGAN; Isola et al. 2017, section 3.2.2)."""

    def __init__(self, width: int = 32) -> None:
        def block(narrow: int, wide: int) -> list[nn.Module]:
            return [nn.Conv2d(narrow, wide, 4, 2, 1), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]

        first: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        deeper = [*block(width, 2 * width), *block(2 * width, 4 * width)]
        super().__init__(*first, *deeper, nn.Conv2d(4 * width, 1, 3, 1, 1))

    def contest(self, real: Tensor, found: Tensor) -> Contest:
        """Pictures (B, 3, H, W) in [-1, 1]. `own` reaches the adversary's weights alone, all else `found` alone."""
        *seen, right = self._layers(real)
        *layers, fooled = self._layers(found, frozen=True)
        own = F.relu(1 - right).mean() + F.relu(1 + self(found.detach())).mean()
        apart = [(one - other.detach()).abs().mean() for one, other in zip(layers, seen, strict=True)]
        return Contest(own, -fooled.mean(), torch.stack(apart).mean())

    def _layers(self, x: Tensor, *, frozen: bool = False) -> list[Tensor]:
        """What each activation says, and the verdict; frozen: no gradient reaches the weights."""
        said = []
        for layer in self:
            own = {name: weight.detach() if frozen else weight for name, weight in layer.named_parameters()}
            x = torch.func.functional_call(layer, own, (x,))
            if isinstance(layer, nn.LeakyReLU):
                said.append(x)
        return [*said, x]


class AutoencoderObjective:
    """L1 + KL + perceptual distance, and an adversary if asked for, all descended in one step."""

    splits = True
    judge = ("psnr", 1)

    def __init__(
        self,
        vae: AutoencoderKL,
        tower: CLIPVisionModel | None,
        pixels: np.ndarray,
        held_out: np.ndarray,
        weights: np.ndarray,
        terms: AutoencoderLoss,
        accelerator: Accelerator,
        *,
        reach: int = 4,
    ) -> None:
        nets: dict[str, nn.Module] = {"vae": vae}
        self._adversary = Adversary() if terms.adversary else None
        if self._adversary is not None:
            nets["adversary"] = self._adversary
        self.module = nn.ModuleDict(nets).to(accelerator.device)
        self.vae = vae
        self.weights = weights
        self._perceptual = Perceptual(tower).to(accelerator.device) if tower is not None else None
        self._near, self._held_out, self._terms, self._reach = Near(pixels), held_out, terms, reach
        self._device = accelerator.device
        self._size = (pixels.shape[1], pixels.shape[2])

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """-> "loss" and its terms. Pictures are moved a little, so that patches fall on no fixed grid."""
        real = shift(to_unit(self._near.take(items, self._device), self._device), draw.uniform(2), self._reach)
        posterior = self.vae.encode(real).latent_dist
        noise = draw.normal(*posterior.mean.shape[1:], device=self._device)
        latents = posterior.mean + posterior.std * noise
        if self._terms.equivariance:
            latents, real = moved(latents, real, self._terms.equivariance, *draw.shared(3))
        found = self.vae.decode(latents).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        terms = {"l1": (found - real).abs().mean(), "kl": kl}
        loss = terms["l1"] + self._terms.kl * kl
        if self._perceptual is not None:
            terms["perceptual"] = self._perceptual(*at_size(self._size, found, real)).mean()
            loss = loss + self._terms.perceptual * terms["perceptual"]
        if self._adversary is not None:
            contest = self._adversary.contest(real, found)
            loss = loss + contest.loss(self._terms, draw.step)
            terms |= contest.terms()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """PSNR in dB of held-out pictures through their latents' means, and the latents' KL in nats an element."""
        self.module.eval()
        errors, kls = [], []
        for part in np.array_split(self._held_out, max(1, -(-len(self._held_out) // 64))):
            real = to_unit(part, self._device)
            posterior = self.vae.encode(real).latent_dist
            found = self.vae.decode(posterior.mean).sample.clamp(-1, 1)
            errors.append(((found - real) / 2).square().mean(dim=(1, 2, 3)))
            kls.append(0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean(dim=(1, 2, 3)))
        return {"psnr": float(-10 * torch.cat(errors).log10().mean()), "kl": float(torch.cat(kls).mean())}

    @torch.no_grad()
    def sheet(self) -> Image.Image | None:
        """Held-out pictures and, below each, what the VAE makes of it."""
        self.module.eval()
        chosen = self._held_out[:: max(1, len(self._held_out) // 24)][:24]
        real = to_unit(chosen, self._device)
        found = self.vae.decode(self.vae.encode(real).latent_dist.mean).sample
        pairs = [
            picture for row in range(0, len(chosen), 12) for part in (real, found) for picture in part[row : row + 12]
        ]
        return contact_sheet([from_unit(picture) for picture in pairs], columns=12)


def moved(
    latents: Tensor, pixels: Tensor, often: float, chance: float, scale: float, turn: float
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) and pixels (B, 3, H, W), both turned by quarters and made smaller, or both as they are.

    often: a probability; chance, scale, turn: numbers in [0, 1), one each for the whole batch. The smaller side is a
    whole number of latents, half of them at least (Kouzelis et al. 2025, section 4.1, with interpolation by area).
    """
    side, factor = latents.shape[-1], pixels.shape[-1] // latents.shape[-1]
    if chance >= often or latents.shape[-2] != side:
        return latents, pixels
    smaller = side - int(scale * (side // 2 + 1))
    quarters = int(4 * turn)
    small = (
        F.interpolate(value, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        for value, size in ((latents, smaller), (pixels, smaller * factor))
    )
    turned, picture = (torch.rot90(value, quarters, (2, 3)).contiguous() for value in small)
    return turned, picture


def at_size(size: tuple[int, int], *pictures: Tensor) -> tuple[Tensor, ...]:
    """Pictures as large as a tower takes them."""
    return tuple(
        value if value.shape[-2:] == size else F.interpolate(value, size=size, mode="bilinear", align_corners=False)
        for value in pictures
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> Mapping[str, float]:
    """Give every latent channel mean 0 and std 1 over `pixels`, inside the VAE's own 1x1 convolutions.

    z' = (z - m) / s a channel is folded into `quant_conv` (mean and log-variance alike) and undone in
    `post_quant_conv`, so that any program reading the folder gets normalised latents; what is left for diffusers'
    one `scaling_factor` is 1 / std over all channels, close to 1. Returns the figures before and after.
    """
    vae.eval()
    mean, std = _moments(vae, pixels, device)
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    _, after = _moments(vae, pixels, device)
    factor = 1.0 / float(after.square().mean().sqrt())
    vae.register_to_config(scaling_factor=factor)
    return {
        "latent_std_before": float(std.square().mean().sqrt()),
        "latent_std": 1.0 / factor,
        "scaling_factor": factor,
    }


def folded(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The weights that `normalise_latents` changes, by name, on the host."""
    held = vae.state_dict()
    return {name: value.cpu().contiguous() for name, value in held.items() if "quant_conv." in name}


def _moments(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of sampled latents by channel, (C,) each; up to 2048 pictures, sampling noise fixed."""
    chosen = pixels[:: max(1, len(pixels) // 2048)]
    drawn = []
    for number, part in enumerate(np.array_split(chosen, max(1, len(chosen) // 64))):
        posterior = vae.encode(to_unit(part, device)).latent_dist
        noise = Draw(0, number, len(part), stream=VALIDATION).normal(*posterior.mean.shape[1:], device=device)
        drawn.append(posterior.mean + posterior.std * noise)
    latents = torch.cat(drawn)
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
