"""DeepCache (Ma, Fang & Wang 2024): a U-Net's deep features change slowly, so some steps take those of an earlier one.

At a step between, only the first level is computed, its way down and its way up; what comes up from below is what came
at the last whole step. It changes the picture, by how much scripts/benchmark_render.py prints.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from latentgen.diffusion.denoiser import Condition, Network
from latentgen.models.network import UnetNetwork, turn


@dataclass(eq=False)
class FeatureCache:
    """One walk's network: whole at every `every`-th time it is told, its first level alone at the times between.

    A step may evaluate several groups of rows at one time; each has its own features. Of other rows than those they
    were made of (guidance that starts inside its interval, say) nothing is reused: rows are the same where their text
    states are the same object. Annealed states are others at every step; there the groups must be laid out alike. A
    time as noisy as the first is another walk's, which takes nothing over.
    """

    unet: Any
    network: Network
    every: int
    step: int = -1
    place: int = 0
    time: float | None = None
    start: float | None = None  # the first time of the walk
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    told: dict[int, tuple[Any, tuple[int, ...], bool]] = field(default_factory=dict)  # states, layout, seen twice

    def __call__(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        self._count(float(time[0]))
        if not self._same_rows(condition.states, time) or self.step % self.every == 0:
            with _remembering(self.unet) as features:
                out: torch.Tensor = self.network(x, time, condition)
            self.features[self.place] = features[0]
            return out
        with _shallow(self.unet, self.features[self.place]):
            return self.network(x, time, condition)

    def _same_rows(self, states: Any, time: torch.Tensor) -> bool:
        """Whether states (B, L, D) are of the rows that were told at this place before."""
        layout = (*states.shape, time.untyped_storage().nbytes())  # the last of all rows, of whose times these are some
        before, laid, steady = self.told.get(self.place, (None, (), True))
        self.told[self.place] = states, layout, before is states
        return before is states or (not steady and laid == layout)

    def _count(self, time: float) -> None:
        if time == self.time:
            self.place += 1
            return
        if self.start is None or time >= self.start:
            self.start, self.step = time, -1
            self.told.clear()
        self.step, self.place, self.time = self.step + 1, 0, time


@dataclass(eq=False)
class FeatureCaches:
    """How often a U-Net is computed whole -> the network of one walk."""

    network: UnetNetwork

    def __call__(self, every: int) -> FeatureCache:
        """A cache for one walk, with nothing in it yet."""
        return FeatureCache(self.network.unet, self.network.walk(), every)


def feature_caches(network: UnetNetwork) -> FeatureCaches | None:
    """Those of a U-Net; None where it has one level only, below which nothing is left to take over."""
    return FeatureCaches(network) if len(network.unet.up_blocks) > 1 else None


@contextmanager
def _remembering(unet: Any) -> Iterator[list[torch.Tensor]]:
    """Inside, the list gets what the last deep block gives."""
    found: list[torch.Tensor] = []
    with turn(unet):
        hook = unet.up_blocks[-2].register_forward_hook(lambda _, __, out: found.append(out))
        try:
            yield found
        finally:
            hook.remove()


@contextmanager
def _shallow(unet: Any, features: torch.Tensor) -> Iterator[None]:
    """Inside, the blocks below the first level are passed by, and the last of them gives `features`."""

    def down(count: int) -> Any:  # as many skip connections as the way up takes away, unread
        return lambda hidden_states, *_, **__: (hidden_states, (hidden_states,) * count)

    def pass_by(value: torch.Tensor | None = None) -> Any:
        return lambda hidden_states=None, *_, **__: hidden_states if value is None else value

    replaced: list[tuple[nn.Module, Any]] = [
        (block, down(len(block.resnets) + bool(block.downsamplers))) for block in unet.down_blocks[1:]
    ]
    deep: Sequence[nn.Module] = [module for module in (unet.mid_block,) if module is not None]
    replaced += [(block, pass_by()) for block in (*deep, *unet.up_blocks[:-2])]
    replaced.append((unet.up_blocks[-2], pass_by(features)))
    with turn(unet):
        for block, forward in replaced:
            block.forward = forward
        try:
            yield
        finally:
            for block, _ in replaced:
                del block.forward  # the class's own is there again
