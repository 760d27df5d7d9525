"""The CLIP stage: text and image towers that agree on which caption belongs to which picture (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentgen.training.captions import CaptionTable
from latentgen.training.draw import Draw
from latentgen.training.near import Near

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


def to_unit(pixels: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels last in memory."""
    if not isinstance(pixels, Tensor):
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())  # memory-mapped, it is not
    return pixels.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def shift(pixels: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """Each picture (B, 3, H, W) moved by up to `reach` pixels, its edge repeated; offsets (B, 2) uniform in [0, 1)."""
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (reach,) * 4, mode="replicate").permute(0, 2, 3, 1)
    top, left = (offsets * (2 * reach + 1)).long().to(pixels.device).T
    rows = top[:, None, None] + torch.arange(height, device=pixels.device)[:, None]
    columns = left[:, None, None] + torch.arange(width, device=pixels.device)
    return padded[torch.arange(len(pixels), device=pixels.device)[:, None, None], rows, columns].permute(0, 3, 1, 2)


class ClipObjective:
    """Symmetric cross-entropy over the batch; equal captions in a batch are all right answers for each other."""

    splits = False
    judge = ("retrieval_image_at_1", 1)

    def __init__(
        self,
        model: CLIPModel,
        words: CLIPTokenizer,
        pixels: np.ndarray,
        captions: CaptionTable,
        held_out: tuple[np.ndarray, Sequence[str]],
        weights: np.ndarray,
        accelerator: Accelerator,
        *,
        reach: int = 3,
    ) -> None:
        self.module = model.to(accelerator.device)
        if accelerator.device.type == "cpu":
            model.set_attn_implementation("eager")  # the fused kernel halves the rate there: its backward pass is slow
        self.weights = weights
        self._words, self._captions, self._held_out = words, captions, held_out
        self._accelerator, self._reach = accelerator, reach
        self._ids = tokens(words, captions.texts)
        self._near = Near(pixels)

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        """Equation of figure 3 of the paper, with soft targets where captions coincide."""
        device = self._accelerator.device
        chosen = self._captions.choose(items, draw.uniform().numpy())
        pixels = shift(to_unit(self._near.take(items, device), device), draw.uniform(2), self._reach)
        images = self.image_features(pixels)
        texts = self.text_features(self._ids[chosen].to(device))
        names = torch.from_numpy(chosen).to(device)
        images, texts, names = (gather(value, self._accelerator) for value in (images, texts, names))
        logits = self.module.logit_scale.exp().clamp(max=100.0) * texts @ images.T
        same = (names[:, None] == names[None, :]).float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "temperature": 1 / self.module.logit_scale.exp()}

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D), unit length."""
        pooled = self.module.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.module.visual_projection(pooled), dim=-1)

    def text_features(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, D), unit length."""
        pooled = self.module.text_model(input_ids=ids).pooler_output
        return F.normalize(self.module.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Retrieval at 1 among the held-out pairs, both ways, beside chance (a picture drawn at random)."""
        self.module.eval()
        pixels, texts = self._held_out
        device = self._accelerator.device
        images = torch.cat([self.image_features(to_unit(p, device)) for p in np.array_split(pixels, _parts(pixels))])
        words = torch.cat([self.text_features(i.to(device)) for i in torch.split(tokens(self._words, texts), 128)])
        similarity = words @ images.T
        _, which, counts = np.unique(np.array(texts), return_inverse=True, return_counts=True)
        right = torch.from_numpy(which).to(device)  # of equal captions each picture is the right one
        return {
            "retrieval_image_at_1": float((right[similarity.argmax(1)] == right).float().mean()),
            "retrieval_text_at_1": float((right[similarity.argmax(0)] == right).float().mean()),
            "chance": float(counts[which].mean()) / len(texts),
            "pairs": float(len(texts)),
        }

    def sheet(self) -> Image.Image | None:
        """Nothing to look at."""
        return None


def _parts(pixels: np.ndarray) -> int:
    return max(1, -(-len(pixels) // 128))


def tokens(words: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (N, L), padded to the context length, what is longer cut."""
    if not texts:
        return torch.zeros((0, words.model_max_length), dtype=torch.long)
    encoded = words(list(texts), padding="max_length", truncation=True, max_length=words.model_max_length)
    return torch.tensor(encoded.input_ids)


def gather(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Every process's rows, one below the other; gradients flow back to the process a row came from."""
    if accelerator.num_processes == 1:
        return value
    from torch.distributed.nn.functional import all_gather

    if not value.requires_grad:
        return accelerator.gather(value)
    return torch.cat(all_gather(value.contiguous()))  # type: ignore[no-untyped-call]
