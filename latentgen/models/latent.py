"""Pixels to moments to latents to pixels: the autoencoder, with its latents in the unit the U-Net was trained in."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latentgen.checkpoint import Checkpoint
from latentgen.errors import InputError
from latentgen.models.engine import EngineNote
from latentgen.models.loading import load_module, quiet


@dataclass(frozen=True)
class Moments:
    """A diagonal Gaussian over latents: mean and std, (B, C, h, w) each, in the unit the U-Net sees (scaled)."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, eps: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) from standard normal eps of that shape."""
        return self.mean + self.std * eps


@dataclass(frozen=True)
class Latent:
    """An AutoencoderKL (Rombach et al. 2022) whose latents are (vae's − shift_factor) · scaling_factor."""

    vae: Any

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "Latent":
        """The autoencoder of a weights folder; for float16 in float32 where that would overflow (`upcast`)."""
        with quiet():
            from diffusers import AutoencoderKL
        if dtype == torch.float16 and upcast(checkpoint):
            dtype = torch.float32
        return cls(load_module(AutoencoderKL, checkpoint, "vae", device, dtype))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.vae.device)

    @property
    def factor(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """C, the number of latent channels."""
        return int(self.vae.config.latent_channels)

    @property
    def scale(self) -> float:
        """What the autoencoder's own latents are multiplied by: diffusers' scaling_factor."""
        return float(self.vae.config.scaling_factor)

    @property
    def shift(self) -> float:
        """What is taken from the autoencoder's own latents first: diffusers' shift_factor, mostly absent."""
        return float(self.vae.config.get("shift_factor") or 0.0)

    def array(self, host: Any) -> torch.Tensor:
        """Host numbers (an array of any kind) as a float32 tensor where the autoencoder lives."""
        return torch.as_tensor(host).to(device=self.vae.device, dtype=torch.float32)

    def encode(self, pixels: torch.Tensor) -> Moments:
        """The moments (B, C, H/factor, W/factor) of pixels (B, 3, H, W) in [−1, 1]; no gradient is kept."""
        with torch.no_grad():
            posterior = self.vae.encode(pixels.to(device=self.vae.device, dtype=self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return Moments((mean - self.shift) * self.scale, std * self.scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), float32 in [0, 1], from latents (B, C, H/factor, W/factor); no gradient is kept.

        An autoencoder that overflows in float16 computes in float32 from then on, and says so (EngineNote).
        """
        inner = latents / self.scale + self.shift
        pixels = self._pixels(inner)
        if self.vae.dtype == torch.float16 and not bool(pixels.isfinite().all()):
            self.vae.to(torch.float32)
            warnings.warn("the autoencoder overflows in float16; it computes in float32 now", EngineNote, stacklevel=2)
            pixels = self._pixels(inner)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)

    def _pixels(self, inner: torch.Tensor) -> torch.Tensor:
        """Pixels in about [−1, 1] from the autoencoder's own latents, in its own type."""
        with torch.no_grad():
            found: torch.Tensor = self.vae.decode(inner.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return found


def upcast(checkpoint: Checkpoint) -> bool:
    """Whether the autoencoder overflows in float16, as Stable Diffusion XL's does but where its config denies it.

    Of 1 and 2 the config says so too (it is diffusers' default), and they run well in it; diffusers asks of XL alone.
    """
    return checkpoint.has_second and bool(checkpoint.config("vae").get("force_upcast", True))


@dataclass(frozen=True)
class GeneratorNoise:
    """Noise from torch generators, drawn in the order in which diffusers draws it: for who passes `generator`.

    generators: one for the whole batch, or one for each picture.
    """

    generators: tuple[torch.Generator, ...]
    batch: int

    @classmethod
    def of(cls, generator: Any, batch: int) -> "GeneratorNoise":
        """From one generator, or a list with one for each picture. Raises InputError where their number is another."""
        several = isinstance(generator, Sequence)
        if not all(isinstance(each, torch.Generator) for each in (generator if several else (generator,))):
            raise InputError(f"generator is {generator!r}; it must be a torch.Generator, or one for each picture")
        if several and len(generator) != batch:
            raise InputError(f"{len(generator)} generators for {batch} pictures; give one for all, or one for each")
        return cls(tuple(generator) if several else (generator,), batch)

    def __len__(self) -> int:
        return self.batch

    def initial(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 (B, *shape), on the host."""
        return self._draw(tuple(shape)).cpu().numpy()

    def step(self, index: int, like: Any, span: tuple[float, float] | None = None) -> Any:
        """Fresh noise of the shape, dtype and device of `like` (B, …); here the order matters, not the index."""
        drawn = self._draw(tuple(like.shape[1:]))
        return drawn.to(like) if isinstance(like, torch.Tensor) else drawn.cpu().numpy().astype(like.dtype)

    def brownian(self, levels: Sequence[float]) -> "GeneratorNoise":
        """Itself: draws from a generator are independent, and lie on no path."""
        return self

    def _draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        if len(self.generators) == 1:
            (generator,) = self.generators
            return torch.randn((self.batch, *shape), generator=generator, device=generator.device)
        rows = [torch.randn((1, *shape), generator=each, device=each.device).cpu() for each in self.generators]
        return torch.cat(rows)
