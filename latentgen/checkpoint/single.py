"""A single .safetensors file in the original layout of latent diffusion, opened as if it were a pipeline folder.

Such a file holds weights and no settings. Those that `latentgen convert` writes carry theirs in the header; of all
others the shapes tell nearly everything, and the family tells the rest (heads, activations, schedule).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.checkpoint.folder import PICKLES, TOKENIZERS, Checkpoint, check_safetensors, open_folder
from latentgen.checkpoint.keys import CLIP, OPENCLIP, Tie, from_ldm, prefix
from latentgen.checkpoint.kinds import refuse_other_kinds, refuse_refiner, unet_kind
from latentgen.checkpoint.shapes import Family, configs_of
from latentgen.durable import sha256
from latentgen.errors import InputError

if TYPE_CHECKING:
    import torch

METADATA = "latentgen"  # of the header: {"configs": {part: config}, "force_zeros": bool, "extras": its extras}


@dataclass(frozen=True)
class SingleFile(Checkpoint):
    """A pipeline in one file. header: name -> its entry in the safetensors header. tokenizers: part -> folder.

    told: whether the header says the configs; else they are read from the shapes. noted: what latentgen.json would say.
    """

    family: Family = Family.SD1
    header: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    told: bool = False
    noted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def assumes_v(self) -> bool:
        """Whether nothing tells what the network predicts, and v is assumed: Stable Diffusion 2, by its shapes."""
        return self.family is Family.SD2 and not self.told and "v_pred" not in self.header

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a network or of the scheduler."""
        return dict(self.configs[part])

    def tokenizer(self, part: str = "tokenizer") -> Path:
        """The folder that was named or found for it."""
        return self.tokenizers[part]

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What latentgen.json said of the folder that the file was made of, as its header says."""
        return dict(self.noted)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's hash and of the tokenizers' files."""
        lines = [sha256(self.folder)]
        for part, place in sorted(self.tokenizers.items()):
            merges = [] if (place / "tokenizer.json").is_file() else place.glob("merges.txt")
            lines += [f"{part} {sha256(path)}" for path in (*sorted(place.glob("*.json")), *merges)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def ties(self, part: str) -> list[Tie]:
        """Every tensor of a part under both names; the LDM name is without its prefix."""
        start, tower = prefix(part, self.family is Family.SDXL, self.tower(part)), self.tower(part)
        names = [name.removeprefix(start) for name in self.header if name.startswith(start)]
        return from_ldm(part, names, self.configs[part], tower)

    def tower(self, part: str) -> str:
        """Which form a text encoder has."""
        second = part == "text_encoder_2" or (part == "text_encoder" and self.family is Family.SD2)
        return OPENCLIP if second else CLIP

    def tensors(self, part: str) -> "dict[str, torch.Tensor]":
        """A network's tensors under diffusers' names, in the type they are stored in."""
        return dict(self._tensors(part))

    def _tensors(self, part: str) -> "Iterator[tuple[str, torch.Tensor]]":
        from safetensors import safe_open

        start = prefix(part, self.family is Family.SDXL, self.tower(part))
        with safe_open(self.folder, framework="pt") as file:
            for tie in self.ties(part):
                value = file.get_tensor(start + tie.ldm)
                if tie.form == "flat":
                    value = value[:, :, 0, 0] if value.ndim == 4 else value
                elif tie.form == "transposed":
                    value = value.T.contiguous()
                elif tie.form == "third":
                    value = value.chunk(3)[tie.third].clone()
                yield tie.diffusers, value


def open_checkpoint(place: Path, *, tokenizer: str | Path | None = None, verify: bool = True) -> Checkpoint:
    """A pipeline folder or a single file, checked. tokenizer: a CLIP tokenizer's folder, which a file needs.

    Raises InputError with one line for a pickle, a torn file, or one that holds something else, and for a tokenizer
    beside a folder's own.
    """
    if place.suffix in PICKLES:
        raise InputError(f"{place} is a pickle, which can run code when opened; only safetensors are loaded")
    if not place.is_file():
        opened = open_folder(place, verify=verify)
        if tokenizer is not None:
            raise InputError(f"{place} has a tokenizer of its own, as folders have; leave the one at {tokenizer} away")
        return opened
    if place.suffix != ".safetensors":
        raise InputError(f"{place} is a file; give the folder that holds model_index.json, or a .safetensors file")
    header = check_safetensors(place)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        refuse_refiner(place)
    if not any(name.startswith("model.diffusion_model.") for name in shapes):
        what = "a LoRA" if any("lora" in name for name in shapes) else "no Stable Diffusion checkpoint as known"
        raise InputError(f"{place} is {what}; name a checkpoint with a U-Net, a VAE and a text encoder in it")
    if framed := next((name for name in shapes if name.startswith("edm_")), None):
        raise InputError(f"{place} was trained in EDM's frame ({framed} is in it), which is not read yet; name another")
    family = Family.of(shapes)
    parts = ["text_encoder", "vae", "unet", *(["text_encoder_2"] if family is Family.SDXL else [])]
    told = _told(place, header, parts)
    configs = told.get("configs") or configs_of(shapes, family, place)
    refuse_other_kinds(place, configs["unet"], int(configs["vae"]["latent_channels"]))
    index = {"_class_name": family.pipeline, "force_zeros_for_empty_prompt": told.get("force_zeros", True)}
    tokens = _tokenizers(place, tokenizer, family)
    weights = dict.fromkeys(parts, (place,))
    known, noted = bool(told.get("configs")), told.get("extras") or {}
    return SingleFile(place, index, weights, None, family, entries, configs, tokens, known, noted)


def _told(place: Path, header: Mapping[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    """What `latentgen convert` says in the header of a file that it wrote, the configs of these parts among it."""
    try:
        told: dict[str, Any] = json.loads((header.get("__metadata__") or {}).get(METADATA) or "{}")
        if configs := told.get("configs"):
            told["configs"] = {part: dict(configs[part]) for part in (*parts, "scheduler")}
            unet_kind(configs["unet"], int(configs["vae"]["latent_channels"]))  # that they can be read
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{place}: its header tells no configs that can be used; convert its folder again") from error
    return told


def _tokenizers(place: Path, given: str | Path | None, family: Family) -> dict[str, Path]:
    """The tokenizer's folder: the one named, `tokenizer/` beside the file, or CLIP's own in the hub's cache."""
    parts = ["tokenizer", *(["tokenizer_2"] if family is Family.SDXL else [])]
    if given is not None:
        root = Path(given).expanduser()
        if not (_holds(root) or _holds(root / "tokenizer")):
            files = "tokenizer.json, or vocab.json and merges.txt"
            raise InputError(f"no tokenizer folder at {root}; give the folder that holds {files}")
    else:
        found = [folder for folder in (place.with_suffix(""), place.parent) if _holds(folder / "tokenizer")]
        root = found[0] if found else _cached_clip(place)
    return {part: next((root / name for name in (part, "tokenizer") if _holds(root / name)), root) for part in parts}


def _holds(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZERS)


def _cached_clip(place: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                "openai/clip-vit-large-patch14", allow_patterns=["*.json", "*.txt"], local_files_only=True
            )
        )
    except Exception as error:
        raise InputError(
            f"{place} holds no tokenizer; give a CLIP tokenizer's folder with tokenizer=, or put it beside the file as "
            "tokenizer/"
        ) from error
