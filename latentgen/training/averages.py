"""Power-function averages of the weights, and any other width of them made after training (Karras et al. 2024, EDM2).

An average of relative width w weighs the weights of step s at step t by (s/t)^gamma: its standard deviation is w·t.
Two such averages, stored now and then along a run, span others: section 3.2 and appendix C of the paper.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentgen.checkpoint.tensors import save_tensors
from latentgen.durable import write_folder
from latentgen.errors import InputError

LARGEST = 0.2886  # sqrt(1/12): the width of an equal average over all steps


def gamma_of(width: float) -> float:
    """The exponent of a relative width in (0, 0.2886): (γ+1)^½ (γ+2)^-1 (γ+3)^-½ = width (equation 123)."""
    if not 0 < width <= LARGEST:
        raise InputError(f"an average of relative width {width:g} does not exist; it must be above 0 and at most 0.288")
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-6].max())


def decay_at(step: int, gamma: float) -> float:
    """How much of the average before step `step` (the first is 1) stays in it: (1 - 1/t)^(γ+1) (equation 127)."""
    return float((1 - 1 / step) ** (gamma + 1))


@dataclass(frozen=True)
class Stored:
    """An average on the disk: of which width, at which step."""

    step: int
    width: float
    path: Path


def store(folder: Path, step: int, averages: dict[float, dict[str, Tensor]]) -> Path:
    """Keep the averages of a step, by width, in half precision: `folder/average-STEP/WIDTH.safetensors`.

    A tensor with a number beyond that precision's range is kept as it is. Raises InputError where one is not finite.
    """
    halves = {width: {name: _halved(name, value, step) for name, value in of.items()} for width, of in averages.items()}

    def write(aside: Path) -> None:
        for width, tensors in halves.items():
            save_tensors(tensors, aside / f"{width:g}.safetensors")
        (aside / "step.json").write_text(json.dumps({"step": step}) + "\n")

    return write_folder(folder / f"average-{step:08d}", write)


def stored(folder: Path) -> list[Stored]:
    """Every average kept in a folder, in the order of steps."""
    found = []
    for place in sorted(folder.glob("average-*")):
        step = int(place.name.removeprefix("average-"))
        found += [Stored(step, float(path.stem), path) for path in sorted(place.glob("*.safetensors"))]
    return found


def combination(kept: Sequence[tuple[int, float]], step: int, width: float) -> np.ndarray:
    """The weights (N,) with which N stored averages (step, width) come nearest to an average at `step` of `width`.

    Least squares over the response of each average to the weights of every step (appendix C.2, algorithm 3).
    """
    steps = np.array([at for at, _ in kept], dtype=np.float64)
    gammas = np.array([gamma_of(each) for _, each in kept])
    gram = _overlap(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted = _overlap(steps, gammas, np.array(float(step)), np.array(gamma_of(width)))
    return np.linalg.lstsq(gram, wanted, rcond=1e-12)[0]


def synthesise(kept: Sequence[Stored], step: int, width: float) -> dict[str, Tensor]:
    """The average at `step` of relative width `width`, float32, from those that were kept at that step and before.

    Raises InputError where nothing was kept.
    """
    usable = [each for each in kept if each.step <= step]
    if not usable:
        raise InputError("no averages were kept up to that step; give `averages = [0.05, 0.1]` in the stage's [train]")
    factors = combination([(each.step, each.width) for each in usable], step, width)
    total: dict[str, Tensor] = {}
    for each, factor in zip(usable, factors, strict=True):
        for name, value in load_file(each.path).items():
            total[name] = total.get(name, torch.zeros(value.shape)) + float(factor) * value.float()
    return total


def _halved(name: str, value: Tensor, step: int) -> Tensor:
    value = value.detach().contiguous()
    half = value.half()
    if bool(torch.isfinite(half).all()):
        return half
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"the average of {name} is not finite at step {step} and is not kept; lower the rate")
    return value


def _overlap(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """∫ of the product of two responses (γ+1) s^γ / t^(γ+1) on 0 < s < min(t_a, t_b)."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
