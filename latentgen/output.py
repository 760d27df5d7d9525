"""What a call of the pipeline gives: pictures, their seeds, and the settings that make each of them again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.checkpoint import Checkpoint


@dataclass(frozen=True)
class Output:
    """What a call gives. images: PIL pictures, or an array as `output_type` says. seeds: one for each picture.

    Where a generator or latents were brought, the seeds say nothing of the first noise. `out[0]` is out.images, as of
    diffusers' outputs.

    settings: all it takes to make the pictures again, JSON-ready; prompt, negative_prompt and seed are lists with an
    entry for each picture. `of(k)` is what picture k's PNG says.
    """

    images: Any
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]

    def __getitem__(self, place: int) -> Any:
        return (self.images,)[place]

    def of(self, k: int) -> dict[str, Any]:
        """The settings of picture k alone, and beside whom it was rendered where it was not alone."""
        return picture_settings(self.settings, k)


def as_tensor(groups: Iterable[Any]) -> Any:
    """Pixels (B', 3, H, W) of either engine, one group after the other, as one torch tensor."""
    import torch

    return torch.cat([torch.as_tensor(pixels) for pixels in groups])


def on_host(pixels: Any) -> np.ndarray:
    """Pixels (B, 3, H, W) of either engine as a NumPy array (B, H, W, 3)."""
    return np.asarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels).transpose(0, 2, 3, 1)


def identity(checkpoint: Checkpoint, path: str | Path | None) -> dict[str, Any]:
    """How the settings name the weights: the folder's name, the path as it was given, and the fingerprint."""
    name = checkpoint.folder.resolve().name if path is None or Path(path).exists() else str(path)
    return {"name": name, "path": None if path is None else Path(path).as_posix(), "sha256": checkpoint.fingerprint}


def picture_settings(settings: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The settings of picture k of a call. In company, sums round differently, so the company is part of them."""
    each = ("prompt", "negative_prompt", "seed")
    alone = {**settings, **{key: settings[key][k] for key in each}}
    company = {"row": k, **{key: settings[key] for key in each}}
    return {**alone, "batch": company} if len(settings["prompt"]) > 1 else alone
