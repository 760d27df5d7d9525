"""A network in parts over processes: FSDP 2, as accelerate's own configuration asks for it (Zhao et al. 2023).

Every process holds its part of each weight, gradient and moment; a block's weights are put together while it computes.
What needs whole tensors (`whole`) has to be asked for by every process at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from latentgen.errors import InputError

if TYPE_CHECKING:
    from latentgen.training.loop import LoopSettings

Module = TypeVar("Module", bound=nn.Module)
OPTIMIZERS = ("adamw", "sgd")  # those that treat each number of a weight alike, and so may see a part of it


def asked(accelerator: Accelerator) -> Any:
    """Accelerate's settings of FSDP; None where it is not asked for, or there is one process alone."""
    if accelerator.num_processes == 1:
        return None
    held = getattr(accelerator.state, "fsdp_plugin", None)
    if held is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        held = FullyShardedDataParallelPlugin()  # on CPUs accelerate reads the settings, but does not keep them
    return held


def shard(module: nn.Module, accelerator: Accelerator, what: LoopSettings) -> None:
    """Split a module over the processes, in place, where accelerate is configured so; else nothing happens.

    Raises InputError for FSDP 1, and for an optimiser that has to see a weight as a whole.
    """
    plugin = asked(accelerator)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise InputError("networks are sharded by FSDP 2; set fsdp_version: 2 in accelerate's configuration")
    if what.optimizer not in OPTIMIZERS:
        choices = " or ".join(OPTIMIZERS)
        raise InputError(f"the optimizer {what.optimizer!r} does not work on parts of weights (FSDP); choose {choices}")
    if not plugin.transformer_cls_names_to_wrap:  # of the blocks its class names, those that it has
        has = {type(part).__name__ for part in module.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(
            has.intersection(getattr(module, "_no_split_modules", None) or ())
        )
    accelerator.state.fsdp_plugin = plugin
    module.to(accelerator.device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    fsdp2_prepare_model(accelerator, module)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are in parts."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def part_again(module: nn.Module) -> None:
    """Leave each process its own part of the weights: after a pass without gradients the last ones are still whole."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def whole(value: Tensor) -> Tensor:
    """A tensor put together from its parts; one that is whole as it is. For every process at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be in parts."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def unsharded(module: Module, fresh: Callable[[], Module]) -> Module:
    """A module whose weights are whole: itself, or a fresh one with its weights. For every process at once."""
    if not is_sharded(module):
        return module
    kept, made = {name: whole(value) for name, value in module.state_dict().items()}, fresh()
    made.load_state_dict(kept)
    return made


def any_of(decisions: tuple[bool, ...], accelerator: Accelerator) -> tuple[bool, ...]:
    """For each decision, whether any process made it. For every process at once."""
    made = torch.tensor([float(each) for each in decisions], device=accelerator.device)
    return tuple(bool(count) for count in accelerator.reduce(made, reduction="sum").tolist())
