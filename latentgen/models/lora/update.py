"""What one layer of an adapter does to a weight: W + w·(W' − W), where each kind has its own W'.

A convolution's weight is (out, in, kh, kw), a linear layer's (out, in). All is NumPy, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentgen.errors import InputError

WHOLE, FIRST, SECOND = "difference", ("k1", "k1_a k1_b"), ("k2", "k2_a k2_b")
# The tensors that make a kind, by the names they have here, and those that may be beside them.
KINDS: Mapping[str, tuple[frozenset[str], ...]] = {
    "low rank": (frozenset({"down", "up"}),),
    "Hadamard": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "Kronecker": tuple(frozenset(f"{one} {other}".split()) for one in FIRST for other in SECOND),
    WHOLE: (frozenset({"diff"}),),
}
EXTRA: Mapping[str, frozenset[str]] = {
    "low rank": frozenset({"mid"}),
    "Hadamard": frozenset({"t1", "t2"}),
    "Kronecker": frozenset({"kt2"}),
    WHOLE: frozenset(),
}


@dataclass(frozen=True)
class Update:
    """An adapter's tensors for one layer. key: the first of them in the file, by which it is named to people.

    alpha: the change is scaled by alpha / rank (alpha / sqrt(rank) where `rooted`: rank-stabilised LoRA, Kalajdzievski
    2023); None is the rank itself, no scale. told: the rank where the file says it, for tensors that do not show it.
    magnitude: DoRA's (Liu et al. 2024, eq. 5), the norm that each row of the changed weight is given; each column,
    where it is (1, in).
    """

    key: str
    kind: str
    tensors: Mapping[str, np.ndarray]
    alpha: float | None = None
    rooted: bool = False
    told: int | None = None
    magnitude: np.ndarray | None = None

    @classmethod
    def of(cls, key: str, tensors: Mapping[str, np.ndarray], **scale: Any) -> "Update":
        """From a layer's tensors by the names of this module, and alpha, rooted and told.

        Raises InputError where the tensors make no kind.
        """
        held = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
        for kind, wholes in KINDS.items():
            for whole in wholes:
                if whole <= set(held) <= whole | EXTRA[kind]:
                    return cls(key, kind, held, magnitude=tensors.get("magnitude"), **scale)
        raise InputError(f"the tensors beside {key} make no LoRA, LoHa, LoKr or difference: {', '.join(sorted(held))}")

    def delta(self, weight: np.ndarray) -> np.ndarray:
        """W' − W for a float32 weight W. Raises ValueError where the shapes do not fit."""
        change = self._change() * self.scale
        if change.shape[0] != weight.shape[0] or change.size != weight.size:
            raise ValueError(f"a change of shape {change.shape} does not fit {weight.shape}")
        change = change.reshape(weight.shape)
        if self.magnitude is None:
            return change
        whole = weight + change
        magnitude = self.magnitude.astype(np.float32)
        if magnitude.ndim > 1 and magnitude.shape[0] == 1 != weight.shape[0]:
            axes, shape = (0, *range(2, weight.ndim)), (1, -1, *(1,) * (weight.ndim - 2))
        else:
            axes, shape = tuple(range(1, weight.ndim)), (-1, *(1,) * (weight.ndim - 1))
        norm = np.sqrt(np.sum(whole * whole, axis=axes, keepdims=True))
        return whole * (magnitude.reshape(shape) / np.maximum(norm, 1e-12)) - weight

    @property
    def rank(self) -> int:
        """The inner dimension; 1 where there is none to scale by."""
        for name, axis in {"down": 0, "w1_b": 0, "k2_b": 0, "k1_b": 0}.items():
            if name in self.tensors:
                return int(self.tensors[name].shape[axis])
        return 1 if self.told is None else self.told

    @property
    def scale(self) -> float:
        """What the tensors' product is multiplied by."""
        unscaled = self.kind == WHOLE or (self.told is None and {"k1", "k2"} <= set(self.tensors))
        if self.alpha is None or unscaled:
            return 1.0
        return self.alpha / (self.rank**0.5 if self.rooted else self.rank)

    def _change(self) -> np.ndarray:
        """The product of the tensors, in any shape with the weight's elements in order."""
        t = {name: tensor.astype(np.float32) for name, tensor in self.tensors.items()}
        if self.kind == WHOLE:
            return t["diff"]
        if self.kind == "low rank":  # Hu et al. 2021: up (out, r) · down (r, in…)
            up, down = (tensor.reshape(tensor.shape[0], -1) for tensor in (t["up"], t["down"]))
            if "mid" not in t:
                return up @ down
            return np.einsum("or,rs...,si->oi...", up, t["mid"], down)  # LoCon in Tucker's form (LyCORIS)
        if self.kind == "Hadamard":  # LoHa: Hyeon-Woo et al. 2022, eq. 2
            return _product(t["w1_a"], t["w1_b"], t.get("t1")) * _product(t["w2_a"], t["w2_b"], t.get("t2"))
        one = t["k1"] if "k1" in t else t["k1_a"] @ t["k1_b"]
        other = t["k2"] if "k2" in t else _product(t["k2_a"], t["k2_b"], t.get("kt2"))
        return np.kron(one.reshape(one.shape + (1,) * (other.ndim - one.ndim)), other)  # LoKr: Yeh et al. 2024


def _product(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    """a (out, r) · b (r, in), or with a core (r, r, kh, kw) between a (r, out) and b (r, in): (out, in, kh, kw)."""
    return a @ b if core is None else np.einsum("ij...,jq,ip->pq...", core, b, a)
