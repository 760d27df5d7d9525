"""Denoising networks behind one signature: (x, time, condition) -> raw output."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Condition, Network
from latentgen.models.loading import capabilities, load_module, quiet
from latentgen.models.memory import Kept

TOLD_ON_GPU = 1 << 30  # bytes of keys and values kept there
_LOCKS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()  # of each U-Net


def turn(unet: Any) -> AbstractContextManager[Any]:
    """The lock of a U-Net: held by who computes with it, and by who changes its layers for one evaluation."""
    lock: AbstractContextManager[Any] = _LOCKS.setdefault(unet, RLock())
    return lock


def load_unet(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> Any:
    """The UNet2DConditionModel of a weights folder, in the memory format in which it answers fastest there."""
    with quiet():
        from diffusers import UNet2DConditionModel
    unet = load_module(UNet2DConditionModel, checkpoint, "unet", device, dtype)
    return unet.to(memory_format=torch.channels_last) if compiled or channels_last(device) else unet


def channels_last(device: torch.device) -> bool:
    """Whether a U-Net that is not compiled computes faster with its channels last in memory.

    It does, but for CPUs with AVX512: there a bf16 step of 51 M weights takes 1.3 times as long so, a float32 one 1.1
    times, and a compiled one still nine tenths of the time.
    """
    return device.type != "cpu" or not capabilities().get("avx512_f")


@dataclass(eq=False)
class UnetNetwork:
    """A diffusers UNet2DConditionModel as a Network: x (B, C, h, w), time (B,), states (B, L, D) -> (B, C, h, w).

    Computes in the module's own type and answers in x's. gradients: whether they are recorded (where the caller has
    not turned them off); None is as the module stands, in training mode yes, in eval mode no. run: what is called in
    the module's place, itself compiled (compiled.py).
    """

    unet: Any
    gradients: bool | None = None
    run: Callable[..., Any] | None = None

    def __call__(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        unet, states = self.unet, condition.states
        assert states is not None, "a U-Net with cross-attention needs text states"
        recorded = unet.training if self.gradients is None else self.gradients
        kind = computing_type(unet, x)
        told = {"encoder_hidden_states": states.to(kind), "return_dict": False}
        if condition.pooled is not None:  # Podell et al. 2023, section 2.2
            told["added_cond_kwargs"] = {"text_embeds": condition.pooled.to(kind), "time_ids": condition.sizes}
        if condition.guided is not None:
            told["timestep_cond"] = condition.guided.to(kind)
        with turn(unet), torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
            out: torch.Tensor = (self.run or unet)(x.to(kind), time, **told)[0]
        return out.to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnetNetwork":
        with turn(self.unet):  # not in the middle of a step, in which layers are other ones
            return UnetNetwork(deepcopy(self.unet, memo), self.gradients, deepcopy(self.run, memo))

    def walk(self) -> Network:
        """The network of one walk, which computes keys and values of a text once; compiled or in training, itself."""
        plain = self.run is not None or self.unet.training or self.gradients
        return self if plain else ToldOnce(self.unet, self)


unet_network = UnetNetwork


def computing_type(module: Any, x: torch.Tensor) -> torch.dtype:
    """The type of a module's first weights, or x's where it has none. diffusers' `.dtype` walks all modules first."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), x.dtype)


@dataclass(eq=False)
class ToldOnce:
    """One walk's U-Net: cross-attention computes its keys and values once for each condition, not at each step.

    A condition is known by its states being the same object. Layers are as they were after each step, and one whose
    weights have changed since (a LoRA, say) computes anew.
    """

    unet: Any
    network: Network
    kept: Kept = field(default_factory=Kept)
    _time: torch.Tensor | None = None  # held, so that no other step's can lie in its place

    def __post_init__(self) -> None:
        layers = (layer for layer in self.unet.modules() if getattr(layer, "is_cross_attention", False))
        told = [told for layer in layers for told in (layer.to_k, layer.to_v) if told is not None]
        # of a weight that was made in torch's inference mode nothing tells whether it has changed
        self._layers = [layer for layer in told if not any(weight.is_inference() for weight in layer.parameters())]
        if self.unet.device.type != "cpu":
            self.kept.room = TOLD_ON_GPU

    def __call__(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        self._time = time
        self.kept.at(time.untyped_storage().data_ptr())  # of the step, without asking a GPU for the number
        told = self.kept.find(lambda states: states is condition.states)
        with turn(self.unet), self._telling({} if told is None else told) as told_now:
            out: torch.Tensor = self.network(x, time, condition)
        if told is None:
            self.kept.keep(condition.states, told_now)
        return out

    @contextmanager
    def _telling(self, told: dict[Any, torch.Tensor]) -> Iterator[dict[Any, torch.Tensor]]:
        """Inside, each layer gives what is told of it, and what it computes is told from then on."""
        before = [layer.__dict__.get("forward") for layer in self._layers]
        for number, (layer, own) in enumerate(zip(self._layers, before, strict=True)):
            key = (number, own, *(weight._version for weight in layer.parameters()))
            layer.forward = partial(_once, told, key, layer.forward)
        try:
            yield told
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                del layer.forward
                if own is not None:  # a LoRA's
                    layer.forward = own


def _once(told: dict[Any, torch.Tensor], key: Any, forward: Callable[..., Any], *given: Any, **more: Any) -> Any:
    if key not in told:
        told[key] = forward(*given, **more)
    return told[key]


def attend_plainly(unet: Any) -> None:
    """Attention as two matrix products and a softmax, the same to rounding.

    On a CPU the fused kernel's backward pass is slow on few places: a training step of the icons' U-Net takes a third
    longer with it.
    """
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


class IdentityAttention:
    """Self-attention whose every place attends to itself alone: perturbed attention (Ahn et al. 2024, equation 14)."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(B, N, D) -> (B, N, D): values and the output projection, without the map between places."""
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))
        return projected


@contextmanager
def perturbed(unet: Any, part: str = "mid_block") -> Iterator[None]:
    """Inside, the self-attention layers of one part of a U-Net are `IdentityAttention`; then what they were.

    Whoever else computes with it waits until then.
    """
    with turn(unet):
        layers = [layer for name, layer in unet.named_modules() if name.startswith(part) and name.endswith(".attn1")]
        before = [layer.processor for layer in layers]
        for layer in layers:
            layer.processor = IdentityAttention()
        try:
            yield
        finally:
            for layer, processor in zip(layers, before, strict=True):
                layer.processor = processor


@dataclass(eq=False)
class PerturbedNetwork:
    """`UnetNetwork` with the self-attention of its middle perturbed, for perturbed-attention guidance."""

    unet: Any
    part: str = "mid_block"

    def __call__(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        with perturbed(self.unet, self.part):
            return unet_network(self.unet)(x, time, condition)


perturbed_network = PerturbedNetwork
