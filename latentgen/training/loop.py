"""The one training loop. What varies is an `Objective`; logging, sampling, saving and stopping are the caller's.

for progress in fit(objective, state, settings, accelerator, seed=0):
    ...                                     # every step: look, save, or leave the loop
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from latentgen.errors import InputError
from latentgen.training.draw import Draw, Order

PATIENCE = 20  # steps in a row whose loss or gradient is not finite before the run gives up


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast. `batch` counts all processes; `rate` rises over `warmup` steps and falls at the end."""

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    decay: float = 0.3  # the part of the run, at its end, over which the rate falls linearly to 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, constant, linear decay to 0 at `steps`."""
        rising = (step + 1) / self.warmup if step < self.warmup else 1.0
        falling = (self.steps - step) / max(1.0, self.decay * self.steps) if self.decay else 1.0
        return self.rate * min(rising, falling, 1.0)


class Objective(Protocol):
    """What a stage trains and by what measure."""

    module: nn.Module  # everything that is trained
    weights: np.ndarray  # (items,): how often each item is seen in an epoch

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """The scalar "loss" to descend, and whatever else is worth a line in the log."""

    def validate(self) -> Mapping[str, float]:
        """Figures on held-out items, with fixed noise."""

    def sheet(self) -> Image.Image | None:
        """A picture of what the module does now; None if there is nothing to look at."""


@dataclass
class TrainState:
    """All that a run is at a step: the module, its running average, the optimiser's moments."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0
    skipped: int = 0

    @classmethod
    def start(cls, module: nn.Module, settings: LoopSettings) -> "TrainState":
        """AdamW (Loshchilov & Hutter 2019) on every trainable weight; matrices and kernels alone are decayed."""
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        groups = [
            {"params": [w for w in trained.values() if w.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [w for w in trained.values() if w.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas, fused=True)
        return cls(module, optimizer, {name: weight.detach().clone() for name, weight in trained.items()})

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Exponential moving average with a warm-up, so that the first steps are soon forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        named = dict(self.module.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [named[name] for name in self.average], 1.0 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the module's weights and their average; twice is nothing. For validation, samples and saving."""
        named = dict(self.module.named_parameters())
        for name, averaged in self.average.items():
            kept = named[name].detach().clone()
            named[name].copy_(averaged)
            averaged.copy_(kept)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state as named tensors, by file: what a checkpoint holds."""
        names: dict[Tensor, str] = {weight: name for name, weight in self.module.named_parameters()}
        moments = {
            f"{key}/{names[weight]}": value
            for weight, entries in self.optimizer.state.items()
            for key, value in entries.items()
        }
        return {"model": dict(self.module.state_dict()), "average": dict(self.average), "optimizer": moments}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Put back what `tensors` gave."""
        self.module.load_state_dict(dict(tensors["model"]))
        for name, averaged in self.average.items():
            averaged.copy_(tensors["average"][name])
        named = dict(self.module.named_parameters())
        self.optimizer.state.clear()
        for key, value in tensors["optimizer"].items():
            kind, name = key.split("/", 1)
            weight = named[name]
            kept = torch.empty_like(weight) if value.shape == weight.shape else torch.empty_like(value)
            self.optimizer.state[weight][kind] = kept.copy_(value)  # in the weight's own memory format
        self.step = step


@dataclass(frozen=True)
class Progress:
    """One step done: its number (1 is the first), the figures of its loss, the rate used, the gradient's norm."""

    step: int
    losses: Mapping[str, float]
    rate: float
    norm: float


def fit(
    objective: Objective, state: TrainState, settings: LoopSettings, accelerator: Accelerator, *, seed: int
) -> Iterator[Progress]:
    """Train from `state.step` to `settings.steps`, yielding after every optimiser step.

    Each process computes its rows of the global batch; gradients are averaged over processes, so that the weights are
    those of a single process up to rounding. Raises InputError when the loss stays non-finite or the batch does not
    divide among the processes.
    """
    world = accelerator.num_processes
    if settings.batch % world:
        raise InputError(f"a batch of {settings.batch} does not divide among {world} processes; choose a multiple")
    share = settings.batch // world
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    order = Order(objective.weights, settings.batch, seed)
    trained = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    bad = 0
    while state.step < settings.steps:
        step = state.step
        state.module.train()
        draw = Draw(seed, step, settings.batch, rows)
        with accelerator.autocast():
            losses = objective.loss(order.items(step)[rows], draw)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        _average_gradients(trained, accelerator)
        norm = float(nn.utils.clip_grad_norm_(trained, settings.clip))
        rate = settings.rate_at(step)
        if math.isfinite(norm):
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            state.optimizer.step()
            bad = 0
        else:
            bad += 1
            state.skipped += 1
            if bad >= PATIENCE:
                raise InputError(f"the gradient was not finite {bad} steps in a row (step {step}); lower the rate")
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        if not bad:
            state.update_average(settings.ema)
        yield Progress(state.step, {name: float(value.detach()) for name, value in losses.items()}, rate, norm)


def _average_gradients(weights: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean of every process's gradients, in one exchange of one flat buffer."""
    if accelerator.num_processes == 1:
        return
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for weight, gradient, part in zip(weights, gradients, flat.split([w.numel() for w in weights]), strict=True):
        weight.grad = gradient.copy_(part.view_as(gradient))
