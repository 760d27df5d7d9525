"""Denoising networks behind one signature: (x, time, condition) -> raw output."""

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


def unet_network(unet: Any, *, gradients: bool | None = None) -> Network:
    """A diffusers UNet2DConditionModel as a Network: x (B, C, h, w), time (B,), states (B, L, D) -> (B, C, h, w).

    Computes in the module's own type and answers in x's. gradients: whether they are recorded (where the caller has
    not turned them off); None is as the module stands, in training mode yes, in eval mode no.
    """

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        states = condition.states
        assert states is not None, "a U-Net with cross-attention needs text states"
        recorded = unet.training if gradients is None else gradients
        with torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
            out = unet(x.to(unet.dtype), time, encoder_hidden_states=states.to(unet.dtype), return_dict=False)[0]
        return out.to(x.dtype)

    return network
