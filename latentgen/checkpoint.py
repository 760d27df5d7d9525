"""A weights folder in diffusers' layout: find it, read it, verify it, write it. Only safetensors, never pickle.

Nothing heavy is imported here until something is written: a torn or foreign folder is told apart from its headers.
"""

import difflib
import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.durable import MANIFEST, recover, sha256, write_folder
from latentgen.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "default_weights", "find", "open_folder", "save_pipeline", "write_folder"]

SHIPPED = ("icons-128", "icons")  # the embedded default: the first that is there
DEFAULTS = "latentgen.json"  # {"defaults": {"num_inference_steps", "guidance_scale", "sampler"}, "sample_size": pixels}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CLASSES = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
PARTS = (*CLASSES, "tokenizer", "scheduler")  # the subfolders that decide a picture


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline folder whose files are all there and whole; `open_folder` makes it.

    index: model_index.json. weights: for each network, its safetensors files (one, or the shards of one).
    variant: "fp16" where the folder holds only files named so, else None.
    """

    folder: Path
    index: Mapping[str, Any]
    weights: Mapping[str, tuple[Path, ...]]
    variant: str | None = None

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of one part: "unet", "vae", "text_encoder", "tokenizer" or "scheduler"."""
        names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        return read_json(self.folder / part / names.get(part, "config.json"))

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What latentgen.json says (defaults, sample_size); empty for a folder that was not made here."""
        path = self.folder / DEFAULTS
        return read_json(path) if path.is_file() else {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of every file that decides a picture; the same in any place and name.

        The hashes come from the manifest; a folder without one is read through once.
        """
        listed = read_manifest(self.folder)["files"]
        paths = (path for part in PARTS for path in (self.folder / part).rglob("*") if path.is_file())
        names = sorted(path.relative_to(self.folder).as_posix() for path in paths)
        lines = (f"{name} {listed.get(name) or sha256(self.folder / name)}\n" for name in names)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def default_weights() -> Path:
    """The folder of the embedded default, inside an installed package or in a checkout's `weights/`."""
    package = Path(__file__).parent
    for name in SHIPPED:
        for folder in (package / "weights" / name, package.parent / "weights" / name):
            if (folder / "model_index.json").is_file():
                return folder
    raise InputError(
        f"no embedded weights here (looked for {' and '.join(SHIPPED)}); name a weights folder, or train one: "
        "latentgen train pipelines/icons.toml"
    )


def find(path: str | Path | None) -> Path:
    """The folder `path` means: None is the embedded default; an "org/name" that is no folder is asked of the hub."""
    if path is None:
        return default_weights()
    folder = Path(path).expanduser()
    recover(folder)
    if folder.exists():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.parent.is_dir():
        return _from_hub(str(path))
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f"did you mean {folder.parent / near[0]}?" if near else "give a weights folder in diffusers' layout"
    raise InputError(f"no weights folder at {path}; {hint}")


def open_folder(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Check that `folder` is a whole Stable Diffusion pipeline folder and say what stands where.

    Sizes are always checked, against the manifest and against each safetensors file's own header; `verify` also
    compares every hash of the manifest (about a second a gigabyte). Raises InputError with one line.
    """
    if folder.suffix in PICKLES:
        raise InputError(f"{folder} is a pickle, which can run code when opened; only safetensors folders are loaded")
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder that holds model_index.json")
    if not folder.is_dir():
        raise InputError(f"no weights folder at {folder}; give a weights folder in diffusers' layout")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is no pipeline folder: it holds no model_index.json")
    index = read_json(folder / "model_index.json")
    if index.get("text_encoder_2"):
        raise InputError(f"{folder} has two text encoders (Stable Diffusion XL), which are not rendered yet")
    for part, name in CLASSES.items():
        entry = index.get(part)
        found = entry[-1] if isinstance(entry, list) and entry else entry
        if found != name:
            kind = index.get("_class_name", "a pipeline")
            raise InputError(f"{folder} holds a {kind} whose {part} is {found}; one with {name} is wanted")
    weights = {part: _weight_files(folder, part) for part in CLASSES}
    for part in PARTS:
        _require_config(folder, part)
    for path in (path for paths in weights.values() for path in paths):
        check_safetensors(path)
    _check_manifest(folder, hashes=verify)
    variant = "fp16" if any(".fp16." in paths[0].name for paths in weights.values()) else None
    return Checkpoint(folder, index, weights, variant)


def check_safetensors(path: Path) -> None:
    """Compare a safetensors file's size with what its header promises, reading the header alone.

    The format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes; `data_offsets` count
    from the end of the header.
    """
    size = path.stat().st_size
    torn = InputError(f"{path} is torn: {size} bytes are no whole safetensors file; fetch or train it again")
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise torn
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise torn from error
    promised = 8 + length + max(ends, default=0)
    if promised != size:
        raise InputError(f"{path} is torn: {size} bytes where its header promises {promised}; fetch or train it again")


def save_pipeline(
    folder: str | Path,
    *,
    tokenizer: Any,
    text_encoder: Any,
    vae: Any,
    unet: Any,
    scheduler_config: Mapping[str, Any],
    extra_files: Mapping[str, bytes | str] | None = None,
    dtype: str = "fp16",
) -> Path:
    """Write a pipeline folder that latentgen and `diffusers.StableDiffusionPipeline.from_pretrained` both open.

    tokenizer: CLIPTokenizer. text_encoder: CLIPTextModel. vae: AutoencoderKL. unet: UNet2DConditionModel.
    scheduler_config: what scheduler_config.json shall say, `_class_name` included; clip_sample is off if it is not
    there, or diffusers would clip latents to [-1, 1] as soon as somebody changes to DDIM. extra_files: relative path
    -> what it holds (latentgen.json, the resolved recipe, metrics, a licence note). dtype: "fp16" or "fp32", of what
    is stored.
    The folder is written aside and swapped into place whole; see `durable.write_folder`.
    """
    networks = {"text_encoder": text_encoder, "vae": vae, "unet": unet}

    def write(aside: Path) -> None:
        for part, network in networks.items():
            (aside / part).mkdir()
            _write_bytes(aside / part / f"{STEMS[part]}.safetensors", _tensors(part, network, dtype))
            _write_json(aside / part / "config.json", _config(part, network))
        _write_tokenizer(aside / "tokenizer", tokenizer)
        _write_json(aside / "scheduler/scheduler_config.json", {"clip_sample": False, **scheduler_config})
        _write_json(aside / "model_index.json", _index(str(scheduler_config["_class_name"])))
        for name, content in (extra_files or {}).items():
            _write_bytes(aside / name, content.encode() if isinstance(content, str) else content)

    return write_folder(Path(folder), write)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one line that says which file is not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """manifest.json as {"files": {path: sha256}, "sizes": {path: bytes}}; both empty where there is none."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return {key: dict(manifest.get(key) or {}) for key in ("files", "sizes")}


def _check_manifest(folder: Path, *, hashes: bool) -> None:
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} is not whole: its manifest names {name}, which is missing")
        size = manifest["sizes"].get(name, path.stat().st_size)
        if path.stat().st_size != size:
            raise InputError(f"{path} is torn: {path.stat().st_size} bytes where the manifest says {size}")
        if hashes and sha256(path) != digest:
            raise InputError(
                f"{path} is not the file the manifest names (its SHA-256 differs); fetch or train it again"
            )


def _weight_files(folder: Path, part: str) -> tuple[Path, ...]:
    """The safetensors files of one network: whole, in fp16 naming, or the shards an index names."""
    place, stem = folder / part, STEMS[part]
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (place / name).is_file():
            return (place / name,)
    shards = place / f"{stem}.safetensors.index.json"
    if shards.is_file():
        paths = tuple(place / name for name in sorted(set(read_json(shards).get("weight_map", {}).values())))
        for path in paths:
            if not path.is_file():
                raise InputError(f"{folder} is not whole: {path.relative_to(folder)} is missing")
        return paths
    for path in sorted(place.glob("*")) if place.is_dir() else ():
        if path.suffix in PICKLES:
            raise InputError(
                f"{path} is a pickle, which can run code when opened; convert it to {stem}.safetensors first"
            )
    raise InputError(f"{folder} is not whole: {part}/{stem}.safetensors is missing")


def _require_config(folder: Path, part: str) -> None:
    """Every part's settings are there: one of the listed sets of files."""
    sets = {
        "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
        "scheduler": (("scheduler_config.json",),),
    }.get(part, (("config.json",),))
    if not any(all((folder / part / name).is_file() for name in names) for names in sets):
        raise InputError(f"{folder} is not whole: {part}/{sets[0][0]} is missing")


def _from_hub(name: str) -> Path:
    """The hub's snapshot of `name`, from the cache or the network; safetensors and settings only."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.safetensors"]
        skipped = ["safety_checker/*", "*.fp16.*", "*non_ema*", "*/model.fp16*"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=skipped))
    except Exception as error:  # the hub's client raises many kinds, and each means: not here, and not from there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name} is no folder here, and the hub cannot give it ({reason}); name a weights folder"
        ) from error


def _tensors(part: str, network: Any, dtype: str) -> bytes:
    """A network's state as the bytes of a safetensors file; floating tensors in the storage type."""
    import torch
    from safetensors.torch import save

    kinds = {"fp16": torch.float16, "fp32": torch.float32}
    if dtype not in kinds:
        raise InputError(f"weights are stored as fp16 or fp32, not {dtype!r}")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in _named(part, network):
        value = tensor.detach().cpu()
        value = value.to(kinds[dtype]) if value.is_floating_point() else value
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{part}: {name} is not finite in {dtype}; the training diverged, nothing was written")
        stored[name] = value.contiguous()
    return save(stored, metadata={"format": "pt"})


def _named(part: str, network: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """State names that every release reads: transformers 5 has dropped CLIP's `text_model.` in memory, not on disk."""
    for name, tensor in network.state_dict().items():
        if part == "text_encoder":
            if name.endswith("position_ids"):
                continue
            name = name if name.startswith("text_model.") else f"text_model.{name}"
        yield name, tensor


def _config(part: str, network: Any) -> dict[str, Any]:
    """A network's config.json, without the place it was loaded from.

    transformers 5 loads in the dtype that is named here: float32, as diffusers loads the other two.
    """
    config: dict[str, Any] = json.loads((network.config if part == "text_encoder" else network).to_json_string())
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "_pre_quantization_dtype")}
    return {**config, "architectures": ["CLIPTextModel"], "dtype": "float32"} if part == "text_encoder" else config


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer in both forms: tokenizer.json, and the vocab.json and merges.txt that older releases read."""
    tokenizer.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    local = ("is_local", "local_files_only", "name_or_path")  # where it was loaded from is nobody's business
    _write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if key not in local})
    model = read_json(folder / "tokenizer.json")["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _index(scheduler: str) -> dict[str, Any]:
    from diffusers import __version__

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
