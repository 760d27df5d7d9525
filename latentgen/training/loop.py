"""The one training loop. What varies is an `Objective`; logging, sampling, saving and stopping are the caller's.

for progress in fit(objective, state, settings, accelerator, seed=0):
    ...                                     # every step: look, save, or leave the loop
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentgen.errors import InputError
from latentgen.training.averages import decay_at, gamma_of
from latentgen.training.draw import BucketOrder, Draw, Order, seed_masks
from latentgen.training.optimizer import make_optimizer
from latentgen.training.sharding import part_again, put, whole

PATIENCE = 20  # steps in a row whose loss or gradient is not finite before the loop gives up


class NotFinite(Exception):
    """The loss or its gradient was not finite for PATIENCE steps in a row."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast. `batch` counts all processes; `rate` rises over `warmup` steps and falls at the end.

    accumulate: in how many parts, one after the other, a batch is computed, to save memory; the result is the same.
    activation_checkpointing: whether what blocks compute is computed again in the backward pass instead of kept.
    averages: relative widths of power-function averages to keep `kept_averages` times in a run (`training.averages`).
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    decay: float = 0.3  # the part of the run, at its end, over which the rate falls to 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999
    decay_shape: str = "linear"  # or "cosine"
    optimizer: str = "adamw"  # a name of training.optimizer.OPTIMIZERS
    accumulate: int = 1
    activation_checkpointing: bool = False
    averages: tuple[float, ...] = ()
    kept_averages: int = 16

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, constant, decay to 0 at `steps`."""
        rising = (step + 1) / self.warmup if step < self.warmup else 1.0
        falling = (self.steps - step) / max(1.0, self.decay * self.steps) if self.decay else 1.0
        if self.decay_shape == "cosine":
            falling = (1 - math.cos(math.pi * min(falling, 1.0))) / 2
        return self.rate * min(rising, falling, 1.0)


class Objective(Protocol):
    """What a stage trains and by what measure."""

    module: nn.Module  # everything that is trained
    weights: np.ndarray  # (items,): how often each item is seen in an epoch
    splits: bool  # whether the loss of a batch is the mean of its parts' losses, so that it may be accumulated
    judge: tuple[str, int]  # the figure of `validate` that tells the best step; +1 the higher the better, -1 the lower

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """The scalar "loss" to descend, and whatever else is worth a line in the log."""

    def validate(self) -> Mapping[str, float]:
        """Figures on held-out items, with fixed noise."""

    def sheet(self) -> Image.Image | None:
        """A picture of what the module does now; None if there is nothing to look at."""


@dataclass
class TrainState:
    """All that a run is at a step: the module, its running averages, the optimiser's moments.

    powers: averages by relative width, beside the exponential one. slowed: what the rate is multiplied by since the
    run went back to a checkpoint, `retreats` times.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    powers: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    step: int = 0
    skipped: int = 0
    retreats: int = 0
    slowed: float = 1.0

    @classmethod
    def start(cls, module: nn.Module, settings: LoopSettings) -> "TrainState":
        """Step 0 of a run over every weight of the module that is to be trained."""
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
        optimizer = make_optimizer(trained.values(), settings, tables)

        def copies() -> dict[str, Tensor]:
            return {name: weight.detach().clone() for name, weight in trained.items()}

        return cls(module, optimizer, copies(), {width: copies() for width in settings.averages})

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Exponential moving average with a warm-up, so that the first steps are soon forgotten; and the others."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        self._draw_near(self.average, decay)
        for width, average in self.powers.items():
            self._draw_near(average, decay_at(max(1, self.step), gamma_of(width)))

    def _draw_near(self, average: dict[str, Tensor], decay: float) -> None:
        named = dict(self.module.named_parameters())
        torch._foreach_lerp_(list(average.values()), [named[name] for name in average], 1.0 - decay)

    @torch.no_grad()
    def flaw(self) -> str | None:
        """The first weight, average or moment that is not finite; None where all are. For every process at once."""
        names: dict[Tensor, str] = {weight: name for name, weight in self.module.named_parameters()}
        named: dict[str, Tensor] = {name: weight for weight, name in names.items() if name in self.average}
        moments: dict[str, dict[str, Tensor]] = {}
        for weight, entries in self.optimizer.state.items():
            for kind, value in entries.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    moments.setdefault(kind, {})[f"{kind} of {names[weight]}"] = value
        for tensors in (named, self.average, *self.powers.values(), *moments.values()):
            norms = torch.stack([whole(norm) for norm in torch._foreach_norm(list(tensors.values()))])
            if not bool(torch.isfinite(norms).all()):  # or so large that its square is not
                for name, value in tensors.items():
                    if not bool(torch.isfinite(whole(value)).all()):
                        return name
        return None

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the module's weights and their average; twice is nothing. For validation, samples and saving."""
        part_again(self.module)
        named = dict(self.module.named_parameters())
        for name, averaged in self.average.items():
            kept = named[name].detach().clone()
            named[name].copy_(averaged)
            averaged.copy_(kept)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state as named tensors, whole, by file: what a checkpoint holds.

        Plain numbers that an optimiser keeps (bitsandbytes counts steps so) are in a file of their own.
        """
        names: dict[Tensor, str] = {weight: name for name, weight in self.module.named_parameters()}
        kept = {
            f"{key}/{names[weight]}": value
            for weight, entries in self.optimizer.state.items()
            for key, value in entries.items()
            if value is not None
        }
        moments = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        numbers = {
            name: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            for name, value in kept.items()
            if name not in moments
        }
        powers = {f"average-{width:g}": dict(average) for width, average in self.powers.items()}
        told = {"model": self.module.state_dict(), "average": self.average, "optimizer": moments, **powers}
        told |= {"numbers": numbers} if numbers else {}
        return {file: {name: whole(value) for name, value in tensors.items()} for file, tensors in told.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Put back what `tensors` gave."""
        held = self.module.state_dict()
        if held.keys() != tensors["model"].keys():
            self.module.load_state_dict(dict(tensors["model"]))  # which says what differs
        for name, value in tensors["model"].items():
            put(held[name], value)
        for file, average in {"average": self.average, **{f"average-{w:g}": a for w, a in self.powers.items()}}.items():
            for name, averaged in average.items():
                put(averaged, tensors[file][name])
        named = dict(self.module.named_parameters())
        beside = {  # weights whose optimiser wants its counts on their device, too
            weight
            for group in self.optimizer.param_groups
            if group.get("fused") or group.get("capturable")
            for weight in group["params"]
        }
        self.optimizer.state.clear()
        for key, value in tensors["optimizer"].items():
            kind, name = key.split("/", 1)
            weight = named[name]
            like = weight if value.shape == weight.shape else value  # in the weight's own memory format
            there = weight.device if value.ndim or weight in beside else None
            kept = torch.empty_like(like, dtype=value.dtype, device=there)
            put(kept, value)
            self.optimizer.state[weight][kind] = kept.detach()
        for key, value in tensors.get("numbers", {}).items():
            kind, name = key.split("/", 1)
            self.optimizer.state[named[name]][kind] = value.item()
        self.step = step


@dataclass(frozen=True)
class Progress:
    """One step done: its number (1 is the first), the figures of its loss, the rate used, the gradient's norm."""

    step: int
    losses: Mapping[str, float]
    rate: float
    norm: float

    @property
    def skipped(self) -> bool:
        """Whether it changed nothing, as its loss or gradient was not finite."""
        return not math.isfinite(self.norm)


def fit(
    objective: Objective, state: TrainState, settings: LoopSettings, accelerator: Accelerator, *, seed: int
) -> Iterator[Progress]:
    """Train from `state.step` to `settings.steps`, yielding after every optimiser step.

    Each process computes its rows of the global batch, in `settings.accumulate` parts; gradients are averaged over
    processes, so that the weights are those of a single process, in one part, up to rounding. A step whose loss or
    gradient is not finite, on any process, is skipped and counted on all. Raises InputError when the batch does not
    divide, and NotFinite when PATIENCE steps in a row were skipped.
    """
    world, parts = accelerator.num_processes, settings.accumulate
    if settings.batch % (world * parts):
        shares = f"{world} processes" if parts == 1 else f"{world} process(es) in {parts} parts"
        raise InputError(f"a batch of {settings.batch} does not divide among {shares}; choose a multiple")
    if parts > 1 and not objective.splits:
        raise InputError("this stage compares the pictures of a batch with each other; leave its accumulate at 1")
    part = settings.batch // (world * parts)
    first = accelerator.process_index * part * parts
    order = order_of(objective, settings.batch, seed)
    trained = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    bad = 0
    while state.step < settings.steps:
        step = state.step
        state.module.train()
        items = order.items(step)
        found: list[Mapping[str, Tensor]] = []
        for start in range(first, first + part * parts, part):
            rows = slice(start, start + part)
            draw = Draw(seed, step, settings.batch, rows)
            seed_masks(seed, step, start)
            with accelerator.autocast():
                losses = objective.loss(items[rows], draw)
            (losses["loss"] / parts).backward()  # type: ignore[no-untyped-call]
            found.append({name: value.detach() for name, value in losses.items()})
        total = torch.stack([losses["loss"] for losses in found]).sum()
        broken = _average_gradients(trained, total - total, accelerator)  # 0, or NaN where a loss is not finite
        norm = float(whole(nn.utils.clip_grad_norm_(trained, settings.clip)) + broken)
        rate = settings.rate_at(step) * state.slowed
        if math.isfinite(norm):
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            state.optimizer.step()
            bad = 0
        else:
            bad += 1
            state.skipped += 1
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        if not bad:
            state.update_average(settings.ema)
        means = {name: float(sum(float(each[name]) for each in found) / parts) for name in found[0]}
        yield Progress(state.step, means, rate, norm)
        if bad >= PATIENCE:
            raise NotFinite(f"the loss or its gradient was not finite {bad} steps in a row, up to step {state.step}")


def order_of(objective: Objective, batch: int, seed: int) -> Order | BucketOrder:
    """The order of an objective's items; where it has `buckets` (items,), a batch holds items of one alone."""
    buckets: np.ndarray | None = getattr(objective, "buckets", None)
    if buckets is None:
        return Order(objective.weights, batch, seed)
    return BucketOrder(objective.weights, batch, seed, buckets)


def recompute_where_asked(name: str, module: nn.Module, settings: LoopSettings) -> None:
    """`checkpoint_activations` for a stage that asks for it. Raises InputError where it has no network that can."""
    if settings.activation_checkpointing and not checkpoint_activations(module):
        raise InputError(f"{name} has nothing to recompute; set activation_checkpointing = false in its [train]")


def checkpoint_activations(module: nn.Module) -> int:
    """Have every network of diffusers or transformers in a module recompute its blocks (Chen et al. 2016); how many.

    The gradients are the same; the memory is that of one block, the time about a third more.
    """
    found = list(recomputing(module))
    for enable in found:
        enable()
    return len(found)


def recomputing(module: nn.Module) -> Iterator[Callable[[], object]]:
    """What has each network of diffusers or transformers in a module recompute its blocks, when it is called."""
    ways = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    for name in ways if getattr(module, "_supports_gradient_checkpointing", True) else ():  # diffusers' own say no
        if callable(enable := getattr(module, name, None)):
            yield enable
            return
    for part in module.children():
        yield from recomputing(part)


def _average_gradients(weights: list[nn.Parameter], broken: Tensor, accelerator: Accelerator) -> Tensor:
    """The mean of every process's gradients, in one exchange of one flat buffer; those in parts are means already.

    broken: a scalar that is 0 or NaN; the one returned is NaN where any process's is.
    """
    if accelerator.num_processes == 1:
        return broken
    if any(isinstance(weight, DTensor) for weight in weights):
        return accelerator.reduce(broken, reduction="mean")
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    told = torch.cat([*(gradient.flatten() for gradient in gradients), broken.to(weights[0]).reshape(1)])
    flat = accelerator.reduce(told, reduction="mean")
    sizes = [weight.numel() for weight in weights]
    for weight, gradient, part in zip(weights, gradients, flat[:-1].split(sizes), strict=True):
        weight.grad = gradient.copy_(part.view_as(gradient))
    return flat[-1]
