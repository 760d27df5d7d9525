"""An adapter under the names and in the file form of kohya's scripts and LyCORIS, which most other programs read."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.checkpoint import find, open_checkpoint
from latentgen.checkpoint.keys import ldm_layers
from latentgen.checkpoint.tensors import save_tensors
from latentgen.durable import new_place, saying_what_failed
from latentgen.errors import InputError
from latentgen.models.lora.file import Lora, read_lora
from latentgen.models.lora.names import BIAS, KOHYA, ORIGINAL, TOWER, divided
from latentgen.models.lora.update import Update

_NAMES = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "diff": "diff"}
_NAMES |= {f"w{a}_{b}": f"hada_w{a}_{b}" for a in (1, 2) for b in "ab"} | {"t1": "hada_t1", "t2": "hada_t2"}
_NAMES |= {f"k{a}": f"lokr_w{a}" for a in (1, 2)} | {f"k{a}_{b}": f"lokr_w{a}_{b}" for a in (1, 2) for b in "ab"}
_NAMES |= {"kt2": "lokr_t2"}
LARGEST = 1e-6  # what a change that was read back may differ by: rounding


def write_kohya(source: str | Path, target: Path, base: str | Path | None = None) -> float:
    """Write an adapter file or folder of any form to `target`, a .safetensors file; the largest difference read back.

    base: the weights it is for, which have to be known for Stable Diffusion XL: the names of its layers there are the
    original layout's, which depend on the network. Raises InputError where they are missing, or are no XL's, where
    something is at `target` or is being written there, and where what was written does not read back as the same
    changes (it is then removed).
    """
    if target.suffix != ".safetensors":
        raise InputError(f"{target} should end in .safetensors, as adapters in kohya's form do")
    with new_place(target):
        return _write(source, target, base)


def _write(source: str | Path, target: Path, base: str | Path | None) -> float:
    lora = read_lora(source)
    checkpoint = None if base is None else open_checkpoint(find(base))
    config = checkpoint.config("unet") if checkpoint is not None and checkpoint.has_second else None
    names = {layer: _name(lora, layer, config) for layer in lora.updates}
    if base is not None and config is None:
        raise InputError(f"{base} is not Stable Diffusion XL, whose adapters alone need a base; leave --base away")
    tensors: dict[str, np.ndarray] = dict(lora.bundled)
    for layer, update in lora.updates.items():
        for key, tensor in _tensors(names[layer], update).items():
            tensors[key] = np.ascontiguousarray(tensor.astype(np.float32))
    aside = target.with_name(f".{target.stem}.writing.safetensors")
    try:
        with saying_what_failed(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, aside, {"ss_network_module": "networks.lora"})
        again = read_lora(aside).updates
        apart = max(_apart(lora, update, again[names[layer]]) for layer, update in lora.updates.items())
        if not apart <= LARGEST:
            raise InputError(f"{target} did not read back as {source} (by {apart:.2g}) and was removed; report this")
        aside.replace(target)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return apart


def _name(lora: Lora, layer: str, config: Mapping[str, Any] | None) -> str:
    """ "unet.down_blocks.0.….to_q" -> "lora_unet_down_blocks_0_…_to_q"; config: of Stable Diffusion XL's U-Net."""
    if layer.endswith(BIAS):
        return _name(lora, layer.removesuffix(BIAS), config) + BIAS
    bare = layer.removeprefix("base_model.model.")
    if bare.startswith(tuple(f"{start}_" for starts in KOHYA.values() for start in starts)):
        return bare  # it is in this form already
    part, rest = divided(bare)
    if part == "unet" and rest.startswith(ORIGINAL):
        return f"{KOHYA['unet'][0]}_{rest.replace('.', '_')}"
    if config is None and (part == "text_encoder_2" or ".transformer_blocks.1." in rest):
        raise InputError(f"{lora.path} is for Stable Diffusion XL; say which weights it is for, as --base weights/xl")
    if part != "unet" and not rest.startswith(TOWER):
        rest = TOWER + rest
    if config is not None and part == "unet":
        known = ldm_layers([rest], config)
        if not known:
            raise InputError(f"{lora.path} is not for the weights named as its base, which have no layer {rest}")
        rest = known[rest]
    start = KOHYA[part][-1 if config is not None else 0]  # of two text encoders the first is lora_te1
    return f"{start}_{rest.replace('.', '_')}"


def _tensors(layer: str, update: Update) -> dict[str, np.ndarray]:
    """An update's tensors by their keys in the file, `layer` being the layer's name there."""
    if layer.endswith(BIAS):
        return {f"{layer.removesuffix(BIAS)}.diff_b": update.tensors["diff"]}
    found = {_NAMES[name]: tensor for name, tensor in update.tensors.items()}
    rank = next(
        (int(update.tensors[n].shape[axis]) for n, axis in {"down": 0, "w1_b": 0, "k2_b": 0, "k1_b": 0}.items()
         if n in update.tensors),
        1,
    )  # fmt: skip
    found["alpha"] = np.array(update.scale * rank, dtype=np.float32)
    if {"k1", "k2"} <= set(update.tensors):  # alpha is not heard there
        found["lokr_w1"] = found["lokr_w1"] * np.float32(update.scale)
    if update.magnitude is not None:
        ranks, shape = max(tensor.ndim for tensor in update.tensors.values()), update.magnitude.shape
        found["dora_scale"] = update.magnitude.reshape(shape if len(shape) > 1 else (-1, *(1,) * (ranks - 1)))
    return {f"{layer}.{name}": tensor for name, tensor in found.items()}


def _apart(lora: Lora, one: Update, other: Update) -> float:
    """The largest difference of two changes, on a weight that is nought but for DoRA, whose norm it decides."""
    try:
        change = one._change() * one.scale
    except ValueError as error:
        shapes = ", ".join(str(tensor.shape) for tensor in one.tensors.values())
        raise InputError(f"{lora.path}: {one.key} and those beside it ({shapes}) do not fit each other") from error
    random = np.random.default_rng(0).standard_normal(change.shape).astype(np.float32)
    if one.magnitude is not None and one.magnitude.ndim > 1:
        random = random.reshape(len(random), one.magnitude.shape[1], -1)  # (out, in, kh·kw), or (out, 1, in·kh·kw)
    return float(np.abs(one.delta(random) - other.delta(random)).max())
