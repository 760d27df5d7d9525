"""Which of Stable Diffusion's relatives a checkpoint is: those that need more than a text are named and refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgen.errors import InputError

TEXT_TO_IMAGE = "text-to-image"
# What a U-Net takes in besides the 4 channels of the noised latents says what it was trained to do.
KINDS = {
    9: ("inpainting", "9 channels in: latents, a mask, and the latents of the masked picture"),
    8: ("instruct-pix2pix", "8 channels in: latents, and the latents of the picture to edit"),
    7: ("upscaling", "7 channels in: latents, and the small picture itself"),
    5: ("depth-to-image", "5 channels in: latents, and a depth map"),
}


def unet_kind(unet: Mapping[str, Any], latent_channels: int = 4) -> str:
    """What a U-Net of this config does: "text-to-image", "inpainting", "instruct-pix2pix", "upscaling",
    "depth-to-image", "image-variation" (unCLIP) or "unknown"."""
    channels = unet.get("in_channels", 4)
    if latent_channels == 4 and channels in KINDS:
        return KINDS[channels][0]
    if channels != latent_channels:
        return "unknown"
    return "image-variation" if unet.get("class_embed_type") else TEXT_TO_IMAGE


def refuse_other_kinds(place: Path, unet: Mapping[str, Any], latent_channels: int) -> None:
    """Raise the one InputError line that says what this U-Net is, unless it makes pictures from text alone."""
    kind, channels = unet_kind(unet, latent_channels), unet.get("in_channels", 4)
    wanted = "name a text-to-image checkpoint"
    if kind == "unknown":
        raise InputError(
            f"{place}: the U-Net takes {channels} channels in where its autoencoder has {latent_channels}; {wanted}"
        )
    if kind == "image-variation":
        raise InputError(f"{place} is an image-variation (unCLIP) model: its U-Net is told of a picture; {wanted}")
    if kind != TEXT_TO_IMAGE:
        what, article = KINDS[channels][1], "a" if kind.startswith("d") else "an"
        raise InputError(
            f"{place} is {article} {kind} model (its U-Net takes {what}); it is not rendered yet: {wanted}"
        )


def check_prediction(place: Path, scheduler: Mapping[str, Any], prediction_type: str | None) -> None:
    """Raise an InputError for a prediction_type that is named for a flow, which predicts one thing alone."""
    if prediction_type is not None and str(scheduler.get("_class_name")).startswith("FlowMatch"):
        raise InputError(
            f"{place} is of flow matching, which predicts the flow; leave prediction_type {prediction_type!r} away"
        )


def refuse_other_pipelines(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise an InputError for XL's refiner: it has no first text encoder, and finishes what the base began."""
    first, second = (index.get(part) for part in ("text_encoder", "text_encoder_2"))
    absent = (None, [None, None])
    if index.get("requires_aesthetics_score") or (first in absent and second not in absent):
        refuse_refiner(folder)


def refuse_refiner(place: Path) -> None:
    """The line for Stable Diffusion XL's refiner."""
    raise InputError(
        f"{place} is Stable Diffusion XL's refiner, which only finishes the pictures of the base model; name the base"
    )
