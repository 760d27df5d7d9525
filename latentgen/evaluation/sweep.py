"""Curves over one setting: the same captions and the same noise, rendered once for each value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentgen.evaluation.metrics import Figure, kid_figure, mean_figure, unit

STRIP = 6  # renderings of each point that are kept to be shown
NAMES = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
LIKENESS, KID = "likeness to the real picture", "KID to the held-out pictures"


@dataclass(frozen=True)
class Point:
    """One value of the setting: its figures, and its first renderings (K, H, W, 3) uint8."""

    value: float
    figures: dict[str, Figure]
    renderings: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    """setting: as `Pipeline` names it. captions: of the renderings that points keep."""

    setting: str
    points: list[Point]
    captions: list[str]

    @property
    def name(self) -> str:
        """What people call the setting."""
        return NAMES[self.setting]

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        points = [{"value": p.value, "figures": {k: vars(f) for k, f in p.figures.items()}} for p in self.points]
        return {"setting": self.name, "points": points}


def sweep(
    setting: str,
    values: Sequence[float],
    captions: Sequence[str],
    draw: Callable[[dict[str, Any], Sequence[str]], np.ndarray],
    see: Callable[[np.ndarray], np.ndarray],
    real: np.ndarray,
    seed: int = 0,
) -> Sweep:
    """Render `captions` at each value and judge.

    draw(settings, captions) -> (N, H, W, 3) uint8, the same noise for the same caption at every call. real: features
    (M, D) of held-out pictures, M of N or more, of which row k is caption k's. Intervals are drawn with one seed, so
    that points differ by less than their intervals say.
    """
    points = []
    for value in sorted(set(values)):
        pixels = draw({setting: value}, captions)
        points.append(Point(value, point_figures(see(pixels), real, seed), pixels[:STRIP]))
    return Sweep(setting, points, list(captions[:STRIP]))


def point_figures(ours: np.ndarray, real: np.ndarray, seed: int = 0) -> dict[str, Figure]:
    """Cosine of each rendering with its own real picture, and the kernel distance to all of them."""
    own = (unit(ours) * unit(real[: len(ours)])).sum(1)
    return {LIKENESS: mean_figure(own, seed), KID: kid_figure(ours, real, seed)}
