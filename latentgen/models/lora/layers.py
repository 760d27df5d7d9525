"""A torch module's linear and convolutional layers, computing with other weights than their own where asked to.

The changed weight is computed once and stands beside the layer's own, which is untouched until it is fused: a step
costs what it costs without adapters, and fused and not fused are the same numbers to the bit.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from latentgen.checkpoint.keys import ldm_layers
from latentgen.checkpoint.write import TEXT
from latentgen.models.lora.stack import Loras


class ModuleLayers:
    """The layers of one network. original: layer -> its names in the LDM layout."""

    def __init__(self, module: nn.Module, original: Mapping[str, Iterable[str]] | None = None) -> None:
        self._layers = {
            name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        self._original = original or {}
        self._used: dict[str, torch.Tensor] = {}  # beside the layers' own weights
        self._own: dict[str, torch.Tensor] = {}  # the originals of those that are fused, in host memory

    def names(self) -> Mapping[str, Iterable[str]]:
        """Layer -> its names in the LDM layout, none or more."""
        return {layer: self._original.get(layer, ()) for layer in self._layers}

    def read(self, layer: str) -> np.ndarray:
        """A layer's original weight, float32."""
        weight = self._own.get(layer, self._layers[layer].weight)
        return np.asarray(weight.detach().float().cpu())

    @torch.no_grad()
    def use(self, changes: Iterable[tuple[str, np.ndarray | None]]) -> int:
        """Compute with these weights from now on; None is the original. Returns how many differ from those before."""
        differing = 0
        for layer, values in changes:
            weight = self._layers[layer].weight
            before = self._used.get(layer, weight).clone()
            if layer in self._own:
                weight.copy_(self._own[layer] if values is None else torch.from_numpy(values))
                if values is None:
                    del self._own[layer]
            elif values is None:
                self._used.pop(layer, None)
            else:
                self._used[layer] = torch.empty_like(weight).copy_(torch.from_numpy(values))  # in the weight's strides
            self._bind(layer)
            differing += not torch.equal(before, self._used.get(layer, weight))
        return differing

    @torch.no_grad()
    def fuse(self) -> None:
        """Make the weights in use the modules' own, the originals kept in host memory."""
        for layer in list(self._used):
            weight = self._layers[layer].weight
            self._own[layer] = weight.detach().to("cpu", copy=True)
            weight.copy_(self._used.pop(layer))
            self._bind(layer)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Give the modules their own weights back, to the bit; those in use stay in use beside them."""
        for layer in list(self._own):
            weight = self._layers[layer].weight
            self._used[layer] = weight.detach().clone()
            weight.copy_(self._own.pop(layer))
            self._bind(layer)

    def _bind(self, name: str) -> None:
        """Let a layer compute with the weight beside it, if there is one, and with its own if not."""
        layer: Any = self._layers[name]
        if name not in self._used:
            layer.__dict__.pop("forward", None)
        else:
            computed = _linear if isinstance(layer, nn.Linear) else _convolution
            layer.forward = partial(computed, layer, self._used[name])


def _linear(layer: nn.Linear, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight, layer.bias)


def _convolution(layer: nn.Conv2d, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return layer._conv_forward(x, weight, layer.bias)


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
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    found = ldm_layers(names, dict(module.config) if hasattr(module, "config") else {})
    return {layer: (name,) for layer, name in found.items()}
