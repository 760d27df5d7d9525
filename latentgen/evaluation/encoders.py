"""Judges: pictures become features. The default is EfficientNet-Lite0, which saw none of the pictures judged.

Features are kept on the disk by the content of the pictures and of the judge, in parts, so a stopped run goes on.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from latentgen.checkpoint import read_json
from latentgen.durable import sha256
from latentgen.errors import InputError
from latentgen.evaluation.efficientnet import EfficientNetLite0
from latentgen.evaluation.inception import InceptionV3
from latentgen.evaluation.kept import kept
from latentgen.models.towers import open_tower

PACKAGE = Path(__file__).parents[1]
PART, BATCH = 256, 32
LITE, INCEPTION = "efficientnet-lite0", "inception-v3"


@dataclass(frozen=True)
class Encoder:
    """name: what figures are called after. identity: of its weights and its way with pixels. texts: CLIP alone."""

    name: str
    identity: str
    pictures: Callable[[torch.Tensor], torch.Tensor]  # (B, 3, H, W) in [0, 1] -> (B, D)
    texts: Callable[[Sequence[str]], torch.Tensor] | None = None

    def features(self, pixels: np.ndarray, cache: Path | None = None) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, D) float32."""
        parts = [self._part(pixels[start : start + PART], cache) for start in range(0, len(pixels), PART)]
        return np.concatenate(parts)

    def _part(self, pixels: np.ndarray, cache: Path | None) -> np.ndarray:
        key = hashlib.sha256(f"{self.identity} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()[:32]

        def look() -> np.ndarray:
            found = []
            for start in range(0, len(pixels), BATCH):
                batch = torch.from_numpy(np.array(pixels[start : start + BATCH])).permute(0, 3, 1, 2).float() / 255
                with torch.no_grad():
                    found.append(self.pictures(batch).float().numpy())
            return np.concatenate(found)

        return kept(cache / f"{key}.npy" if cache is not None else None, len(pixels), look)


def open_judge(path: str | Path | None = None) -> Encoder:
    """None or "default" is the judge that comes along; else a folder with a CLIP, DINOv2, Inception or EfficientNet.

    Raises InputError with one line.
    """
    folder = default_judge() if path in (None, "default") else Path(str(path)).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"no judge at {folder}; give a folder with config.json and model.safetensors, or default")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no .safetensors; a judge's weights are safetensors, never pickles")
    config = read_json(folder / "config.json")
    identity = " ".join([str(sorted(config.items())), *(sha256(file) for file in files)])
    if config.get("model_type") == LITE:
        network, size = EfficientNetLite0.load(files[0]), int(config.get("image_size", 128))

        def see(pixels: torch.Tensor) -> torch.Tensor:
            resized = F.interpolate(255 * pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
            values = (resized - config.get("image_mean", 127)) / config.get("image_std", 128)
            features: torch.Tensor = network(values.contiguous(memory_format=torch.channels_last))
            return features

        return Encoder(LITE, identity, see)
    if config.get("model_type") == INCEPTION:
        inception = InceptionV3.load(files[0])
        return Encoder(INCEPTION, identity, lambda pixels: inception(pixels))
    tower = open_tower(folder)
    texts = tower.texts if tower.kind == "clip" else None
    return Encoder(tower.kind, f"{identity} {tower.size} {tower.mean} {tower.std}", tower.pictures, texts)


def default_judge() -> Path:
    """Inside an installed package, or in a checkout's `weights/`."""
    for folder in (PACKAGE / "weights" / "judge", PACKAGE.parent / "weights" / "judge"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise InputError("the default judge is not here; make it with python scripts/build_judge.py, or name one (--judge)")
