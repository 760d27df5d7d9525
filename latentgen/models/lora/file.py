"""Adapter files as people have them: PEFT, diffusers, kohya and LyCORIS, in safetensors only.

Every key of a file is read, or the file is refused with the first key that is not known.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.checkpoint import check_safetensors, read_json
from latentgen.durable import sha256
from latentgen.errors import InputError
from latentgen.models.lora.names import BIAS, BUNDLED, TOWER
from latentgen.models.lora.update import Update
from latentgen.values import as_path

IN_FOLDERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers', PEFT's
METADATA = "lora_adapter_metadata"  # diffusers' own, in the header of what it saves
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_LOW_RANK = {"lora_down": "down", "lora.down": "down", "lora_A": "down", "lora_up": "up", "lora.up": "up"}
_LOW_RANK |= {"lora_B": "up", "lora_mid": "mid", "_lora.down": "down", "_lora.up": "up"}
_LOW_RANK |= {"lora_linear_layer.down": "down", "lora_linear_layer.up": "up"}  # diffusers', of the text encoder
_OTHERS = {"alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "diff": "diff"}
_OTHERS |= {"w_norm": "diff", "diff_b": BIAS, "b_norm": BIAS}
_OTHERS |= {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_OTHERS |= {f"lokr_{name}": f"k{name.lstrip('w')}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}
_KEY = re.compile(
    rf"(?P<layer>.+?)(?:(?P<low>{'|'.join(rf'[.]{re.escape(n)}' if n[0] != '_' else n for n in _LOW_RANK)})"
    rf"(?:\.[\w-]+)?\.weight|\.(?P<other>{'|'.join(_OTHERS)})(?:\.weight)?)"
)
# How diffusers named the layers of attention when adapters were attention processors.
_OLD = {
    r"\.processor\.to_(q|k|v)$": r".to_\1",
    r"\.processor\.to_out$": ".to_out.0",
    r"\.self_attn\.to_(q|k|v)$": r".self_attn.\1_proj",
    r"\.self_attn\.to_out$": ".self_attn.out_proj",
}


@dataclass(frozen=True, eq=False)
class Lora:
    """A file, read: what it does to each layer, by the layer's name in the file, with `names.BIAS` after it for a bias.

    sha256: the file's; where settings were read beside it, of both files' hashes. bundled: the tensors of new words
    that lie in it too, which change no layer.
    """

    path: Path
    sha256: str
    updates: Mapping[str, Update]
    bundled: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """The new words that lie in the file too."""
        return tuple(dict.fromkeys(key.split(".")[1] for key in self.bundled))

    @property
    def name(self) -> str:
        """What it is called where nobody says: the file's stem, or the folder's name."""
        return self.path.parent.resolve().name if self.path.name in IN_FOLDERS else self.path.stem


def read_lora(path: str | Path) -> Lora:
    """Read an adapter file, or the folder that PEFT or diffusers wrote one into.

    Raises InputError, one line, for a file that is torn, a pickle, no adapter, not finite, or holds a key that is not
    known.
    """
    file = _file(as_path("a LoRA's path", path).expanduser())
    check_safetensors(file)
    tensors, metadata = _tensors(file)
    bundled = {key: tensors.pop(key) for key in [*tensors] if key.startswith(BUNDLED)}
    beside, identity = file.with_name("adapter_config.json"), sha256(file)
    said = _said(metadata)
    if file.name == IN_FOLDERS[1] and beside.is_file():
        said = {"": read_json(beside)}
        identity = hashlib.sha256(f"{identity} {sha256(beside)}".encode()).hexdigest()
    layers: dict[str, dict[str, np.ndarray]] = {}
    first: dict[str, str] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise InputError(f"{file} holds {key}, which is no part of a LoRA that is known here; nothing was loaded")
        if not np.isfinite(tensor).all():
            raise InputError(f"{file}: {key} is not finite; the file is broken, or its training diverged")
        if tensor.size == 0 or (found["other"] == "alpha" and tensor.size != 1):
            raise InputError(f"{file}: {key} has shape {tensor.shape}, which no LoRA's has")
        layer, low, other = found["layer"], found["low"], found["other"]
        if low is not None and low.startswith("_"):
            layer = _renamed(layer)
        name = _LOW_RANK[low.removeprefix(".")] if low is not None else _OTHERS[other]
        if name == BIAS:
            layer, name = layer + BIAS, "diff"
        layers.setdefault(layer, {})[name] = tensor.reshape(-1) if other == "lora_magnitude_vector" else tensor
        if name != "alpha":
            first.setdefault(layer, key)
    if not layers:
        raise InputError(f"{file} holds no tensors; it is no LoRA")
    updates = {}
    for layer, held in layers.items():
        try:
            scale = _scale(layer, held.pop("alpha", None), said)
            updates[layer] = Update.of(first.get(layer, f"{layer}.alpha"), held, **scale)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        except (AttributeError, TypeError, ValueError, re.error) as error:  # of PEFT's settings
            raise InputError(f"{file}: the rank or alpha that is told of {layer} cannot be used ({error})") from error
    return Lora(file, identity, updates, bundled)


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter's folder or file rather than a whole checkpoint's, from its names alone."""
    place = Path(path).expanduser()
    if place.is_dir():
        return not (place / "model_index.json").is_file() and any((place / name).is_file() for name in IN_FOLDERS)
    if place.suffix != ".safetensors" or not place.is_file():
        return False
    keys = [key for key in check_safetensors(place) if key != "__metadata__" and not key.startswith(BUNDLED)]
    return all(map(_KEY.fullmatch, keys))


def _file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened; only .safetensors LoRAs are loaded")
    if path.is_dir():
        for name in IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path} holds no LoRA: neither {' nor '.join(IN_FOLDERS)} is there")
    if not path.is_file():
        raise InputError(f"no LoRA at {path}; give a .safetensors file, or the folder that holds one")
    return path


def _tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a safetensors file, bfloat16 widened, and the metadata of its header."""
    from safetensors import SafetensorError, deserialize

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
    data = file.read_bytes()
    try:
        found: dict[str, Any] = dict(deserialize(data))  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {str(error).splitlines()[0]}") from error
    tensors = {}
    metadata = header.pop("__metadata__", None) or {}
    for key in header:  # in the file's own order
        entry = found[key]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            tensor = (np.frombuffer(entry["data"], dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in kinds:
            tensor = np.frombuffer(entry["data"], dtype=kinds[entry["dtype"]])
        else:
            raise InputError(f"{file}: {key} is stored as {entry['dtype']}; F32, F16 and BF16 are read")
        tensors[key] = tensor.reshape(entry["shape"])
    return tensors, metadata


def _said(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings of each network from the header of a file that diffusers saved: {"unet.": {"lora_alpha": …}}."""
    try:
        flat = json.loads(metadata.get(METADATA) or "{}")
    except ValueError:
        return {}
    said: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        part, _, name = key.partition(".")
        said.setdefault(f"{part}.", {})[name] = value
    return said


def _scale(layer: str, alpha: np.ndarray | None, said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """alpha, rooted and told of a layer: by the file's own tensor, else by PEFT's settings."""
    if alpha is not None:
        return {"alpha": float(alpha.reshape(-1)[0])}
    part, config = next(((part, config) for part, config in said.items() if layer.startswith(part)), ("", {}))
    bare = layer.removeprefix(part).removeprefix("base_model.model.").removeprefix(TOWER)
    forms = (bare, TOWER + bare)

    def here(name: str, pattern: str) -> Any:
        special = (
            value
            for key, value in (config.get(pattern) or {}).items()
            if any(re.match(rf"(.*\.)?({key})$", form) for form in forms)  # as PEFT's get_pattern_key, `^` and all
        )
        return next(special, config.get(name))

    value = here("lora_alpha", "alpha_pattern") if "lora_alpha" in config else here("alpha", "alpha_pattern")
    if value is None:
        return {"alpha": None}
    if not math.isfinite(float(value)):
        raise ValueError(f"alpha is {value}")
    rank = here("r", "rank_pattern")
    return {
        "alpha": float(value),
        "rooted": bool(config.get("use_rslora")),
        "told": None if rank is None else int(rank),
    }


def _renamed(layer: str) -> str:
    for old, new in _OLD.items():
        layer = re.sub(old, new, layer)
    return layer
