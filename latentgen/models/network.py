"""Denoising networks behind one signature: (x, time, condition) -> raw output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Condition, Network
from latentgen.models.loading import load_module, quiet


def load_unet(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The UNet2DConditionModel of a weights folder, channels last in memory (its convolutions are faster so)."""
    with quiet():
        from diffusers import UNet2DConditionModel
    return load_module(UNet2DConditionModel, checkpoint, "unet", device, dtype).to(memory_format=torch.channels_last)


def unet_network(unet: Any, *, gradients: bool | None = None, run: Callable[..., Any] | None = None) -> Network:
    """A diffusers UNet2DConditionModel as a Network: x (B, C, h, w), time (B,), states (B, L, D) -> (B, C, h, w).

    Computes in the module's own type and answers in x's. gradients: whether they are recorded (where the caller has
    not turned them off); None is as the module stands, in training mode yes, in eval mode no. run: what is called in
    the module's place, itself compiled (compiled.py).
    """

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        states = condition.states
        assert states is not None, "a U-Net with cross-attention needs text states"
        recorded = unet.training if gradients is None else gradients
        told = {"encoder_hidden_states": states.to(unet.dtype), "return_dict": False}
        if condition.pooled is not None:  # Podell et al. 2023, section 2.2
            told["added_cond_kwargs"] = {"text_embeds": condition.pooled.to(unet.dtype), "time_ids": condition.sizes}
        with torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
            out = (run or unet)(x.to(unet.dtype), time, **told)[0]
        return out.to(x.dtype)

    return network


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
    """Inside, the self-attention layers of one part of a U-Net are `IdentityAttention`; then what they were."""
    layers = [layer for name, layer in unet.named_modules() if name.startswith(part) and name.endswith(".attn1")]
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = IdentityAttention()
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor


def perturbed_network(unet: Any, part: str = "mid_block") -> Network:
    """`unet_network` with the self-attention of its middle perturbed, for perturbed-attention guidance."""
    plain = unet_network(unet)

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        with perturbed(unet, part):
            return plain(x, time, condition)

    return network
