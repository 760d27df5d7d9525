"""Arrays that are computed once and kept: latents and text states, keyed by all they depend on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from latentgen.errors import InputError
from latentgen.training.clip import to_unit, tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer


def cached(path: Path, shape: tuple[int, ...], dtype: type, parts: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
    """The array kept in `path` (.npy), memory-mapped; computed part after part, aside, if it is not there."""
    if not path.is_file():
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            array = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
            row = 0
            for part in parts():
                array[row : row + len(part)] = part
                row += len(part)
            array.flush()
            aside.replace(path)
        except OSError as error:
            raise InputError(f"cannot write the cache {path}: {error.strerror or error}; free space there") from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
    kept: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return kept


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> Iterator[np.ndarray]:
    """(n, 2, C, h, w) float32: mean and std of each picture's posterior, scaled as diffusers scales latents."""
    vae = vae.to(device).eval()
    factor = vae.config.scaling_factor
    for start in range(0, len(pixels), 64):
        posterior = vae.encode(to_unit(pixels[start : start + 64], device)).latent_dist
        yield (torch.stack([posterior.mean, posterior.std], 1) * factor).float().cpu().numpy()


@torch.no_grad()
def text_states(
    model: CLIPTextModel, words: CLIPTokenizer, texts: tuple[str, ...], device: torch.device
) -> Iterator[np.ndarray]:
    """(n, L, D) float16: last hidden states of each text, then of the empty one."""
    model = model.to(device).eval()
    for ids in torch.split(tokens(words, [*texts, ""]), 256):
        yield model(input_ids=ids.to(device)).last_hidden_state.half().cpu().numpy()
