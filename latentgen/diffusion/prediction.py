"""What the network's output means: eps, x0, v or flow, each one row of the same 2x2.

With x = alpha·x0 + sigma·eps and out = a·x0 + b·eps,

    [ x   ]   [ alpha  sigma ] [ x0  ]
    [ out ] = [ a      b     ] [ eps ]        det = alpha·b − sigma·a

so every prediction type is a row (a, b), in the VP, VE and flow frames alike, and one solve recovers x0 and eps.
Nothing downstream of this file knows which prediction a network makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentgen.diffusion.array import Array, increase
from latentgen.errors import InputError
from latentgen.values import shown

Row = Callable[[Any, Any], tuple[Any, Any]]  # (alpha, sigma) -> (a, b)

ROWS: dict[str, Row] = {
    "eps": lambda alpha, sigma: (0.0, 1.0),  # Ho et al. 2020, eq. 11
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho 2022, section 4: v = alpha·eps − sigma·x0
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Liu et al. 2022; Lipman et al. 2023: dx/dt = eps − x0
}
DIFFUSERS_NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Prediction:
    """One row of the 2x2. `name` is eps, x0, v or flow; diffusers' names are taken too and stored as ours.

    Raises InputError for any other name.
    """

    name: str

    def __post_init__(self) -> None:
        name = DIFFUSERS_NAMES.get(self.name, self.name) if isinstance(self.name, str) else None
        if name not in ROWS:
            known = ", ".join([*ROWS, *DIFFUSERS_NAMES])
            raise InputError(f"unknown prediction type {shown(self.name)}; it can be one of: {known}")
        object.__setattr__(self, "name", name)

    def target(self, x0: Array, eps: Array, alpha: Any, sigma: Any) -> Array:
        """What the network should put out for clean data x0 and noise eps (same shape as both)."""
        a, b = ROWS[self.name](alpha, sigma)
        return a * x0 + b * eps

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        """alpha·b − sigma·a: how far the output can tell x0 from eps once x is known."""
        a, b = ROWS[self.name](alpha, sigma)
        return alpha * b - sigma * a

    def x0(self, out: Array, x: Array, alpha: Any, sigma: Any) -> Array:
        """The first half of `split`, for samplers, which need no more: three operations on x, or none."""
        if self.name == "x0":
            return out
        a, b = ROWS[self.name](alpha, sigma)
        det = alpha * b - sigma * a
        return increase((b / det) * x, -sigma / det, out)

    def split(self, out: Array, x: Array, alpha: Any, sigma: Any) -> tuple[Array, Array]:
        """(x0, eps) from the network's output and its input, both of x's shape; alpha and sigma broadcast with x."""
        a, b = ROWS[self.name](alpha, sigma)
        det = alpha * b - sigma * a
        return (b * x - sigma * out) / det, (alpha * out - a * x) / det

    def join(self, x0: Array, x: Array, alpha: Any, sigma: Any) -> Array:
        """The output that would have given this x0 at this x: the inverse of `split`'s first half."""
        return self.target(x0, (x - alpha * x0) / sigma, alpha, sigma)
