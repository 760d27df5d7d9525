"""Optimisers by name, through an explicit table."""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch

from latentgen.errors import InputError
from latentgen.training.muon import Muon

if TYPE_CHECKING:
    from latentgen.training.loop import LoopSettings

Groups = Iterable[dict[str, Any]]


def _adamw(groups: Groups, what: "LoopSettings") -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused."""
    return torch.optim.AdamW(groups, lr=what.rate, betas=what.betas, fused=True)


def _adamw_8bit(groups: Groups, what: "LoopSettings") -> torch.optim.Optimizer:
    """AdamW whose moments are kept in 8 bits by blocks (Dettmers et al. 2022); needs the package bitsandbytes."""
    return _eight_bit()(groups, lr=what.rate, betas=what.betas)


def _eight_bit() -> Any:
    """Its class. Raises InputError where the package is not installed, or cannot be imported."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        why = " ".join(str(error).split())
        raise InputError(
            f'the optimizer "adamw-8bit" needs the package bitsandbytes; install it, or choose "adamw" ({why})'
        ) from error
    return AdamW8bit


def _adafactor(groups: Groups, what: "LoopSettings") -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018): second moments by row and column, hardly any memory."""
    return torch.optim.Adafactor(groups, lr=what.rate)


def _sgd(groups: Groups, what: "LoopSettings") -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov's momentum, which is the first of `betas`."""
    return torch.optim.SGD(groups, lr=what.rate, momentum=what.betas[0], nesterov=what.betas[0] > 0)


def _muon(groups: Groups, what: "LoopSettings") -> torch.optim.Optimizer:
    """Muon for matrices and kernels (`training.muon`), AdamW for the rest."""
    return Muon(groups, lr=what.rate, betas=what.betas)


OPTIMIZERS: Mapping[str, Callable[[Groups, "LoopSettings"], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
}


def check_optimizers(names: Iterable[str]) -> None:
    """Raises InputError where one needs a package that cannot be imported; to be asked before any work."""
    if "adamw-8bit" in names:
        _eight_bit()


def make_optimizer(
    weights: Iterable[torch.nn.Parameter], what: "LoopSettings", tables: Set[torch.Tensor] = frozenset()
) -> torch.optim.Optimizer:
    """The optimiser `what.optimizer` names, over weights that are trained; matrices and kernels alone are decayed.

    tables: those of the matrices whose rows are looked up, and do not act as a map: Muon leaves them to AdamW.
    Raises InputError for a name that is not in the table, or whose package cannot be imported.
    """
    if what.optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {what.optimizer!r}; it can be one of: {', '.join(OPTIMIZERS)}")
    chosen = list(weights)
    maps = [weight for weight in chosen if weight.ndim >= 2]
    groups: list[dict[str, Any]] = [
        {"params": maps, "weight_decay": what.weight_decay},
        {"params": [weight for weight in chosen if weight.ndim < 2], "weight_decay": 0.0},
    ]
    if what.optimizer == "muon":
        looked_up = [weight for weight in maps if weight in tables]
        groups[0]["params"] = [weight for weight in maps if weight not in tables]
        groups[1]["orthogonal"] = False
        groups.append({"params": looked_up, "weight_decay": what.weight_decay, "orthogonal": False})
    return OPTIMIZERS[what.optimizer]([group for group in groups if group["params"]], what)
