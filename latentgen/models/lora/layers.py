"""A torch module's linear and convolutional layers and norms, computing with other weights than their own where asked.

A changed weight or bias is computed once and stands beside the layer's own, which is untouched until it is fused: a
step costs what it costs without adapters, and fused and not fused are the same numbers to the bit.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from latentgen.checkpoint.keys import ldm_layers
from latentgen.checkpoint.write import TEXT
from latentgen.models.lora.names import BIAS
from latentgen.models.lora.stack import Loras
from latentgen.models.network import turn


class ModuleLayers:
    """The layers of one network. original: layer -> its names in the LDM layout."""

    def __init__(self, module: nn.Module, original: Mapping[str, Iterable[str]] | None = None) -> None:
        self._module = module
        self._layers = dict(_layers(module))
        self._original = original or {}
        self._used: dict[str, torch.Tensor] = {}  # beside the layers' own weights
        self._own: dict[str, torch.Tensor] = {}  # the originals of those that are fused, in host memory

    def names(self) -> Mapping[str, Iterable[str]]:
        """Layer -> its names in the LDM layout, none or more; a layer's bias is called as it is, and `BIAS`."""
        biased = (name for name, layer in self._layers.items() if layer.bias is not None)
        found = {layer: self._original.get(layer, ()) for layer in self._layers}
        return found | {f"{layer}{BIAS}": () for layer in biased}

    def read(self, layer: str) -> np.ndarray:
        """A layer's original weight, or bias, float32."""
        weight = self._own.get(layer, self._weight(layer))
        return np.asarray(weight.detach().float().cpu())

    def largest(self, layer: str) -> float:
        """The largest number that a layer's weight can hold."""
        return torch.finfo(self._weight(layer).dtype).max

    @torch.no_grad()
    def use(self, changes: Iterable[tuple[str, np.ndarray | None]]) -> int:
        """Compute with these weights from now on; None is the original. Returns how many differ from those before."""
        differing = 0
        with turn(self._module):
            for layer, values in changes:
                weight = self._weight(layer)
                before = self._used.get(layer, weight).clone()
                if layer in self._own:
                    weight.copy_(self._own[layer] if values is None else torch.from_numpy(values))
                    self._used.pop(layer, None)  # there where fusing was interrupted
                    if values is None:
                        del self._own[layer]
                elif values is None:
                    self._used.pop(layer, None)
                else:
                    used = torch.empty_like(weight)  # in the weight's strides
                    self._used[layer] = used.copy_(torch.from_numpy(values))
                self._bind(layer)
                differing += not torch.equal(before, self._used.get(layer, weight))
        return differing

    @torch.no_grad()
    def fuse(self) -> None:
        """Make the weights in use the modules' own, the originals kept in host memory.

        Like `unfuse` it may be interrupted anywhere, and called again: nothing is let go before it is written.
        """
        with turn(self._module):
            for layer in list(self._used):
                weight = self._weight(layer)
                if layer not in self._own:
                    self._own[layer] = weight.detach().to("cpu", copy=True)
                weight.copy_(self._used[layer])
                del self._used[layer]
                self._bind(layer)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Give the modules their own weights back, to the bit; those in use stay in use beside them."""
        with turn(self._module):
            for layer in list(self._own):
                weight = self._weight(layer)
                if layer not in self._used:
                    self._used[layer] = weight.detach().clone()
                self._bind(layer)
                weight.copy_(self._own[layer])
                del self._own[layer]

    def _weight(self, name: str) -> torch.Tensor:
        """The layer's own weight, or its bias, as it is now."""
        layer = self._layers[name.removesuffix(BIAS)]
        found: torch.Tensor = layer.bias if name.endswith(BIAS) else layer.weight
        return found

    def _bind(self, name: str) -> None:
        """Let a layer compute with what is beside it, if there is anything, and with its own if not."""
        bare = name.removesuffix(BIAS)
        layer, weight, bias = self._layers[bare], self._used.get(bare), self._used.get(bare + BIAS)
        if weight is None and bias is None:
            layer.__dict__.pop("forward", None)
        else:
            layer.forward = partial(_computed, layer, weight, bias)


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that adapters change."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
            yield name, layer


def _computed(layer: Any, weight: torch.Tensor | None, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives with another weight or bias than its own; None is its own."""
    own = layer.weight if weight is None else weight, layer.bias if bias is None else bias
    if isinstance(layer, nn.Linear):
        return functional.linear(x, *own)
    if isinstance(layer, nn.GroupNorm):
        return functional.group_norm(x, layer.num_groups, *own, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(x, layer.normalized_shape, *own, layer.eps)
    found: torch.Tensor = layer._conv_forward(x, *own)
    return found


def module_loras(**modules: nn.Module) -> Loras:
    """The adapters of a pipeline's networks, none loaded yet: unet=…, text_encoder=…, text_encoder_2=…."""
    return Loras({part: ModuleLayers(module, _original(part, module)) for part, module in modules.items()})


def tower_loras(unet: nn.Module, towers: Iterable[nn.Module]) -> Loras:
    """The same of a U-Net and one text encoder, or two."""
    return module_loras(unet=unet, **dict(zip(TEXT, towers, strict=False)))


def _original(part: str, module: Any) -> Mapping[str, Iterable[str]]:
    """Layer -> its names in the LDM layout, by which people's files for Stable Diffusion XL know a U-Net's layers."""
    if part != "unet":
        return {}
    found = ldm_layers((name for name, _ in _layers(module)), dict(module.config) if hasattr(module, "config") else {})
    return {layer: (name,) for layer, name in found.items()}
