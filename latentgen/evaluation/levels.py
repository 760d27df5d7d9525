"""What the networks know without rendering: loss by noise level, bits of a latent, and the autoencoder's pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Denoiser
from latentgen.diffusion.likelihood import continuous_bound
from latentgen.diffusion.loss import denoising_loss
from latentgen.diffusion.schedule.plan import from_config
from latentgen.evaluation.metrics import Figure, mean_figure
from latentgen.image import to_bytes
from latentgen.models.engine import open_engine

LEVELS = 10
BATCH = 32


@dataclass(frozen=True)
class Level:
    """The middle of a tenth of the schedule's time, its mean logSNR, and the simple loss there."""

    time: float
    logsnr: float
    loss: Figure


@dataclass(frozen=True)
class Inside:
    """levels, and all of them together; bits: a density in bits per latent dimension, so it may be below 0.

    reconstructions: (N, H, W, 3) uint8, from the posterior's mean.
    """

    levels: list[Level]
    loss: Figure
    bits: Figure | None
    reconstructions: np.ndarray


def look_inside(checkpoint: Checkpoint, pixels: np.ndarray, captions: Sequence[str], seed: int = 0) -> Inside:
    """Held-out pictures (N, H, W, 3) uint8 with their captions, through torch on the CPU; fixed noise of `seed`.

    Each picture is tried at every level (Ho et al. 2020, eq. 14, for the checkpoint's own prediction); the bound is
    Kingma et al. 2021, eq. 11, two draws of t a picture.
    """
    engine = open_engine(checkpoint, "torch", device="cpu", dtype="float32")
    plan = from_config(checkpoint.config("scheduler"))
    losses: list[list[Any]] = [[] for _ in range(LEVELS)]
    bits: list[Any] = []
    seen: list[np.ndarray] = []
    generator = torch.Generator().manual_seed(seed)
    denoiser = Denoiser(engine.network, plan.schedule, plan.prediction)
    times = (torch.arange(LEVELS) + 0.5) / LEVELS
    for start in range(0, len(pixels), BATCH):
        given = torch.from_numpy(np.array(pixels[start : start + BATCH])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            moments = engine.latent.encode(given)
            decoded = engine.latent.decode(moments.mean)
            seen.append(to_bytes(decoded.permute(0, 2, 3, 1).numpy()))
            x0 = moments.sample(torch.randn(moments.mean.shape, generator=generator))
            condition = engine.text.encode(list(captions[start : start + BATCH]))
            for level, time in enumerate(times):
                eps = torch.randn(x0.shape, generator=generator)
                found = denoising_loss(
                    engine.network, plan.schedule, plan.prediction, x0, condition, time.repeat(len(x0)), eps
                )
                losses[level].append(found.numpy())
            if plan.prediction.name != "flow":
                estimate = partial(denoiser, condition=condition)
                bound = continuous_bound(estimate, plan.schedule, x0, generator=generator, samples=2, bins=None)
                bits.append(bound.total.rows.numpy())
    rows = np.stack([np.concatenate(part) for part in losses])  # (levels, N)
    logsnr = [float(plan.schedule.logsnr(time[None])[0]) for time in times]
    levels = [Level(float(t), s, mean_figure(r, seed)) for t, s, r in zip(times, logsnr, rows, strict=True)]
    return Inside(
        levels,
        mean_figure(rows.mean(0), seed),
        mean_figure(np.concatenate(bits), seed) if bits else None,
        np.concatenate(seen),
    )
