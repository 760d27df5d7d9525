"""What the networks know without rendering: loss by noise level, bits, and the autoencoder's pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Denoiser
from latentgen.diffusion.likelihood import continuous_bound, laplace_nats
from latentgen.diffusion.loss import denoising_loss
from latentgen.diffusion.schedule.continuous import UniformLogsnr
from latentgen.diffusion.schedule.plan import from_config
from latentgen.diffusion.schedule.protocol import Schedule
from latentgen.diffusion.schedule.reading import known
from latentgen.evaluation.metrics import Figure, mean_figure
from latentgen.image import to_bytes
from latentgen.models.engine import open_engine
from latentgen.models.text import whole_sizes

LEVELS = 10
BATCH = 32
# Spreads of the autoencoder's error, pixels in [-1, 1], that its decoder is taken to have, in equal parts.
SCALES = torch.logspace(-3, 0, 16, dtype=torch.float64)


@dataclass(frozen=True)
class Level:
    """The middle of a tenth of the schedule's time, its mean logSNR, and the simple loss there."""

    time: float
    logsnr: float
    loss: Figure


@dataclass(frozen=True)
class Inside:
    """levels, and all of them together; bits: a density in bits per latent dimension, so it may be below 0.

    pixel_bits: bits per pixel and channel of the pictures' 256 levels, for text, latent and decoder together.
    reconstructions: (N, H, W, 3) uint8, from the posterior's mean.
    """

    levels: list[Level]
    loss: Figure
    bits: Figure | None
    pixel_bits: Figure | None
    reconstructions: np.ndarray


def look_inside(checkpoint: Checkpoint, pixels: np.ndarray, captions: Sequence[str], seed: int = 0) -> Inside:
    """Held-out pictures (N, H, W, 3) uint8 with their captions, through torch on the CPU; fixed noise of `seed`.

    Each picture is tried at every level (Ho et al. 2020, eq. 14, for the checkpoint's own prediction); the bound is
    Kingma et al. 2021, eq. 11, two draws of t a picture. In pixels it is E_q(z|x)[−log p(x|z) + bound(z) + log q(z|x)]
    (Vahdat et al. 2021, eq. 1) with one draw of z, the decoder a mixture of Laplace distributions about its picture.
    """
    engine = open_engine(checkpoint, "torch", device="cpu", dtype="float32")
    plan = from_config(known(checkpoint.config("scheduler")))
    losses: list[list[Any]] = [[] for _ in range(LEVELS)]
    bits: list[Any] = []
    pixel_bits: list[Any] = []
    seen: list[np.ndarray] = []
    generator = torch.Generator().manual_seed(seed)
    denoiser = Denoiser(engine.network, plan.schedule, plan.prediction)
    times = (torch.arange(LEVELS) + 0.5) / LEVELS
    even = _evenly(plan.schedule)
    for start in range(0, len(pixels), BATCH):
        given = torch.from_numpy(np.array(pixels[start : start + BATCH])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            moments = engine.latent.encode(given)
            decoded = engine.latent.decode(moments.mean)
            seen.append(to_bytes(decoded.permute(0, 2, 3, 1).numpy()))
            x0 = moments.sample(torch.randn(moments.mean.shape, generator=generator))
            condition = engine.text.encode(list(captions[start : start + BATCH]))
            if condition.pooled is not None:
                condition = replace(condition, sizes=whole_sizes(given.shape[2], given.shape[3], condition.pooled))
            for level, time in enumerate(times):
                eps = torch.randn(x0.shape, generator=generator)
                found = denoising_loss(
                    engine.network, plan.schedule, plan.prediction, x0, condition, time.repeat(len(x0)), eps
                )
                losses[level].append(found.numpy())
            if plan.prediction.name != "flow":
                estimate = partial(denoiser, condition=condition)
                bound = continuous_bound(estimate, even, x0, generator=generator, samples=2, bins=None)
                bits.append(bound.total.rows.numpy())
                density = bound.total.rows * x0[0].numel() * math.log(2)
                entropy = (moments.std.double().log() + 0.5 * math.log(2 * math.pi * math.e)).flatten(1).sum(1)
                nats = laplace_nats(given, 2 * engine.latent.decode(x0) - 1, SCALES) + density - entropy
                pixel_bits.append((nats / (given[0].numel() * math.log(2))).numpy())
    rows = np.stack([np.concatenate(part) for part in losses])  # (levels, N)
    logsnr = [float(plan.schedule.logsnr(time[None])[0]) for time in times]
    levels = [Level(float(t), s, mean_figure(r, seed)) for t, s, r in zip(times, logsnr, rows, strict=True)]
    return Inside(
        levels,
        mean_figure(rows.mean(0), seed),
        mean_figure(np.concatenate(bits), seed) if bits else None,
        mean_figure(np.concatenate(pixel_bits), seed) if pixel_bits else None,
        np.concatenate(seen),
    )


def _evenly(schedule: Schedule) -> Schedule:
    """The schedule whose logSNR falls evenly between the same ends: the bound is the same, its draws differ less."""
    alpha, sigma = schedule.marginal(0.0)
    if abs(float(alpha**2 + sigma**2) - 1) > 1e-6:
        return schedule  # of another frame
    ends = schedule.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64))
    return UniformLogsnr(*(float(end) for end in ends))
