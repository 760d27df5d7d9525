"""Picture encoders of others, from a local folder: CLIP (both towers) and DINOv2, as transformers reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentgen.checkpoint import read_json
from latentgen.errors import InputError
from latentgen.models.loading import quiet

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Tower:
    """kind: "clip" or "dinov2". size: the side in pixels that it takes. mean, std: of pixels in [0, 1]."""

    kind: str
    model: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: Any = None

    def pictures(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D): CLIP's projection, or DINOv2's class token after the norm."""
        resized = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (resized.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        values = (resized - mean) / std
        with torch.no_grad():
            if self.kind == "dinov2":
                return self.model(pixel_values=values).pooler_output
            return self.model.visual_projection(self.model.vision_model(pixel_values=values).pooler_output)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, D); what is longer than the context is cut."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)


def open_tower(folder: Path) -> Tower:
    """A CLIP or DINOv2 folder (config.json, model.safetensors; CLIP: its tokenizer too) on the CPU, in float32.

    Pixels are prepared as preprocessor_config.json says; without one, to mean and std 0.5 for CLIP (as CLIP is trained
    here) and ImageNet's for DINOv2. Raises InputError.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("clip", "dinov2"):
        raise InputError(f"{folder} holds a {kind} model; a judge is clip, dinov2, inception-v3 or efficientnet-lite0")
    try:
        with quiet():
            from transformers import CLIPModel, CLIPTokenizerFast, Dinov2Model

            model = (CLIPModel if kind == "clip" else Dinov2Model).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
            words = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True) if kind == "clip" else None
    except Exception as error:  # transformers and the readers below it raise many kinds
        raise InputError(f"{folder} cannot be read as {kind}: {' '.join(str(error).split())[:160]}") from error
    said = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    crop = said.get("crop_size") or {}
    trained = model.config.vision_config.image_size if kind == "clip" else model.config.image_size
    size = int(crop if isinstance(crop, int) else crop.get("height") or trained)
    plain = ((0.5,) * 3, (0.5,) * 3) if kind == "clip" else IMAGENET
    mean, std = (
        tuple(said.get(key) or default) for key, default in zip(("image_mean", "image_std"), plain, strict=True)
    )
    return Tower(kind, model.eval().requires_grad_(False), size, mean, std, words)
