"""Muon: the momentum of each matrix made orthogonal before it is applied (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latentgen.models.loading import has_bf16

# The quintic of Jordan et al. 2024, steep at 0: five turns bring singular values from 1e-3 to within [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
TURNS = 5
TOGETHER = 8  # matrices of one shape in one product
MATCHED = 0.2  # the root mean square of an AdamW update, which ours is given (Liu et al. 2025, equation 4)


class Muon(torch.optim.Optimizer):
    """Matrices by Muon with Nesterov's momentum, a kernel (out, in, h, w) as a matrix of out rows; the rest by AdamW.

    A group is by Muon where its "orthogonal" is true. Its updates are as large as AdamW's (Liu et al. 2025), so one
    rate serves both. betas: AdamW's; momentum: Muon's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": True}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient. A closure is not supported."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            held = [(weight, weight.grad) for weight in group["params"] if weight.grad is not None]
            if group["orthogonal"]:
                self._by_muon(held, group)
            else:
                self._by_adamw(held, group)

    def _by_muon(self, held: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, gradient in held:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            ahead = gradient.lerp(state["momentum"], group["momentum"])
            matrix = ahead.reshape(len(ahead), -1)  # (out, in · h · w)
            shapes[matrix.shape[0], matrix.shape[1]].append((weight, matrix))
        for shape, members in shapes.items():
            step = -group["lr"] * MATCHED * max(shape) ** 0.5
            for start in range(0, len(members), TOGETHER):
                part = members[start : start + TOGETHER]
                updates = orthogonal(torch.stack([matrix for _, matrix in part]))
                for (weight, _), update in zip(part, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.reshape(weight.shape).to(weight.dtype), alpha=step)

    def _by_adamw(self, held: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for weight, gradient in held:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] += 1
            count = float(state["step"])
            state["exp_avg"].lerp_(gradient, 1 - first)
            state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
            spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(1e-8)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / (1 - first**count))


def orthogonal(matrices: Tensor) -> Tensor:
    """(..., m, n) -> the nearest matrices whose singular values are all near 1, by Newton and Schulz.

    In bfloat16 where the hardware multiplies it, which is exact enough; in float32 elsewhere.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    found = found.to(torch.bfloat16 if has_bf16() else torch.float32)
    first, third, fifth = QUINTIC
    for _ in range(TURNS):
        square = found @ found.mT
        found = first * found + (third * square + fifth * square @ square) @ found
    return found.mT if tall else found
