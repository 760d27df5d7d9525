"""Arrays that are computed once and kept: latents and text states, keyed by all they depend on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from latentgen.data.kept import key_of, known_rows, write_keys
from latentgen.data.variants import Varied
from latentgen.errors import InputError
from latentgen.training.clip import to_unit, tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer


def cached(path: Path, shape: tuple[int, ...], dtype: type, parts: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
    """The array kept in `path` (.npy), memory-mapped; computed part after part, aside, if it is not there.

    One that is torn, or of another shape or type, is as good as not there.
    """
    if (found := _kept(path, shape, dtype)) is not None:
        return found
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
        _allot(aside)
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


def _kept(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == dtype else None


def _allot(path: Path) -> None:
    """Have the disk set aside what a mapped file may fill: a full one says so now, and kills no write to memory."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that cannot
                    raise


@dataclass(frozen=True)
class Items:
    """What to keep: one row of `shape` for each key.

    name: of what kind the rows are and which network makes them; keys: digests (`key_of`) of what each is made of.
    parts: computes the rows of the items it is given the numbers of, part after part.
    """

    name: str
    keys: Sequence[bytes]
    shape: tuple[int, ...]
    dtype: type
    parts: Callable[[np.ndarray], Iterator[np.ndarray]]


def cached_items(folder: Path, items: Items, report: Callable[[str], None] = lambda _: None) -> np.ndarray:
    """The rows, memory-mapped; only those whose key no array of that name in the folder holds are computed."""
    keys = items.keys
    if not keys:
        return np.zeros((0, *items.shape), items.dtype)
    path = folder / f"{items.name}-{hashlib.sha256(b''.join(keys)).hexdigest()[:12]}.npy"

    def in_order() -> Iterator[np.ndarray]:
        known = known_rows(folder, f"{items.name}-*", items.shape, items.dtype)
        missing = np.array([number for number, key in enumerate(keys) if key not in known], dtype=np.int64)
        if len(missing):
            report(f"cache: computing {len(missing)} of {len(keys)} rows of {path.name}")
        fresh = (row for part in items.parts(missing) for row in part) if len(missing) else iter(())
        for key in keys:
            array, row = known.get(key, (None, 0))
            yield (array[row] if array is not None else next(fresh))[None]
        write_keys(path, keys)

    return cached(path, (len(keys), *items.shape), items.dtype, in_order)


@torch.no_grad()
def latent_moments(
    vae: AutoencoderKL, pixels: np.ndarray | Varied, device: torch.device, rows: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """(n, 2, C, h, w) float32: mean and std of each picture's posterior, shifted and scaled as diffusers has latents.

    rows: the numbers of the pictures to encode; None is all.
    """
    vae = vae.to(device).eval()
    factor, center = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    chosen = np.arange(len(pixels)) if rows is None else rows
    for start in range(0, len(chosen), 64):
        posterior = vae.encode(to_unit(pixels[chosen[start : start + 64]], device)).latent_dist
        yield (torch.stack([posterior.mean - center, posterior.std], 1) * factor).float().cpu().numpy()


@torch.no_grad()
def text_states(
    model: CLIPTextModel, words: CLIPTokenizer, texts: Sequence[str], device: torch.device, *, empty: bool = True
) -> Iterator[np.ndarray]:
    """(n, L, D) float16: last hidden states of each text, then of the empty one (unless empty is False)."""
    model = model.to(device).eval()
    for ids in torch.split(tokens(words, [*texts, ""] if empty else texts), 256):
        yield model(input_ids=ids.to(device)).last_hidden_state.half().cpu().numpy()


def latent_items(vae: AutoencoderKL, pixels: np.ndarray | Varied, device: torch.device) -> Items:
    """The moments of pictures (N, H, W, 3), by pixels and VAE."""
    config, (height, width) = vae.config, pixels.shape[1:3]
    factor = 2 ** (len(config.block_out_channels) - 1)
    shape = (2, config.latent_channels, height // factor, width // factor)

    def parts(rows: np.ndarray) -> Iterator[np.ndarray]:
        return latent_moments(vae, pixels, device, rows)

    center = (config.shift_factor,) if config.shift_factor else ()
    name = f"latents-{_short(content_of(vae), config.scaling_factor, *center)}"
    keys = pixels.keys if isinstance(pixels, Varied) else [key_of(picture) for picture in pixels]
    return Items(name, keys, shape, np.float32, parts)


def text_items(model: CLIPTextModel, words: CLIPTokenizer, texts: Sequence[str], device: torch.device) -> Items:
    """The states of texts, then of the empty one, by text, tokenizer and encoder."""
    told = [*texts, ""]

    def parts(rows: np.ndarray) -> Iterator[np.ndarray]:
        return text_states(model, words, [told[row] for row in rows], device, empty=False)

    heads = model.config.num_attention_heads
    name = f"text-{_short(content_of(model), heads, sorted(words.get_vocab().items()))}"
    shape = (words.model_max_length, model.config.hidden_size)
    return Items(name, [key_of(text.encode()) for text in told], shape, np.float16, parts)


def content_of(network: nn.Module) -> str:
    """A hash of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _short(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
