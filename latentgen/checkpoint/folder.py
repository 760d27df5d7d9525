"""A pipeline folder in diffusers' layout: what it must hold, and whether all of it is there and whole."""

import hashlib
import json
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentgen.checkpoint.kinds import refuse_other_pipelines
from latentgen.durable import MANIFEST, sha256
from latentgen.errors import InputError

DEFAULTS = "latentgen.json"  # {"defaults": {"num_inference_steps", "guidance_scale", …}, "sample_size": pixels}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "vae": "AutoencoderKL",
    "unet": "UNet2DConditionModel",
}
STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
TOKENIZERS = ("tokenizer.json",), ("vocab.json", "merges.txt")  # each set is a whole tokenizer
SECOND = ("text_encoder_2", "tokenizer_2")  # what Stable Diffusion XL has besides
_STORED = re.compile(r"\.safetensors$|\.safetensors\.index\.")
_VERIFYING = threading.Lock()
_VERIFIED: dict[Path, object] = {}  # by folder: the files as they were when their hashes were compared
PARTS = (*CLASSES, "tokenizer", "tokenizer_2", "scheduler")  # the subfolders that decide a picture


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline whose files are all there and whole; `open_folder` (or `open_checkpoint`) makes it.

    folder: where it lies; the file itself where it is a single one. index: model_index.json. weights: for each
    network, its safetensors files (one, or the shards of one). variant: "fp16" where the folder holds only files named
    so, else None.
    """

    folder: Path
    index: Mapping[str, Any]
    weights: Mapping[str, tuple[Path, ...]]
    variant: str | None = None

    def __post_init__(self) -> None:
        self.__dict__["_opened"] = {path: _touched(path) for path in self._deciding() if path.is_file()}

    @property
    def has_second(self) -> bool:
        """Whether there are two text encoders, as in Stable Diffusion XL."""
        return "text_encoder_2" in self.weights

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that decide a picture, of `PARTS`."""
        return tuple(part for part in PARTS if self.has_second or part not in SECOND)

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of one part, as its JSON file says it; `part` is one of `PARTS`."""
        name = part.removesuffix("_2")
        names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        return read_json(self.folder / part / names.get(name, "config.json"))

    def tokenizer(self, part: str = "tokenizer") -> Path:
        """The folder in which a tokenizer's files lie; `part` is "tokenizer" or "tokenizer_2"."""
        return self.folder / part

    def verify(self) -> None:
        """Compare every hash of the manifest (about a second a gigabyte), the first time only; any thread may ask.

        The first time is that of this process, for files that have not been touched since. Raises InputError where a
        file is not the one that the manifest names, and, every time, where one is not what it was when the checkpoint
        was opened. A single file has no manifest.
        """
        with _VERIFYING:
            opened = self.__dict__["_opened"].items()
            if any(path.is_file() and _touched(path) != then for path, then in opened):  # one that is gone is read next
                raise InputError(f"{self.folder}: the weights changed since they were opened; open them again")
            if not self.__dict__.get("_verified"):
                place, state = self.folder.resolve(), _state(self.folder)
                if _VERIFIED.get(place) != state:
                    _check_manifest(self.folder, hashes=True)
                    _VERIFIED[place] = state
                self.__dict__["_verified"] = True

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What latentgen.json says (defaults, sample_size); empty for a folder that was not made here."""
        path = self.folder / DEFAULTS
        return read_json(path) if path.is_file() else {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of every file that decides a picture; the same in any place and name.

        Left out are ONNX graphs, which are made of the others, hidden files, and weights that are not read: pickles,
        and those of another variant. The hashes come from the manifest; a folder without one is read through once.
        """
        listed = read_manifest(self.folder)["files"]
        names = sorted(path.relative_to(self.folder).as_posix() for path in self._deciding())
        lines = (f"{name} {listed.get(name) or sha256(self.folder / name)}\n" for name in names)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _deciding(self) -> Iterator[Path]:
        """The files that decide a picture, as `fingerprint` says; of a single file that file alone."""
        if self.folder.is_file():
            yield self.folder
        read = {path for paths in self.weights.values() for path in (*paths, _index(paths[0]))}
        for path in (path for part in self.parts for path in (self.folder / part).rglob("*") if path.is_file()):
            left_out = path.suffix in (".onnx", *PICKLES) or path.name.startswith(".")
            if not left_out and (path in read or not _STORED.search(path.name)):
                yield path


def open_folder(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Check that `folder` is a whole Stable Diffusion pipeline folder and say what stands where.

    Sizes are always checked, against the manifest and against each safetensors file's own header; `verify` also
    compares every hash of the manifest, as `Checkpoint.verify` does later. Raises InputError with one line.
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder that holds model_index.json")
    if not folder.is_dir():
        raise InputError(f"no weights folder at {folder}; give a weights folder in diffusers' layout")
    if (folder / "finetune.json").is_file() and not (folder / "model_index.json").is_file():
        about = read_json(folder / "finetune.json")
        how = "--word" if about.get("method") == "textual-inversion" else "--lora"
        name = (about.get("base") or {}).get("name", "the weights it was made from")
        raise InputError(f"{folder} holds no whole weights but what {name} learned; render {name} with {how} {folder}")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is no pipeline folder: it holds no model_index.json")
    index = read_json(folder / "model_index.json")
    refuse_other_pipelines(folder, index)
    second = _class_of(index, "text_encoder_2") is not None
    classes = {part: name for part, name in CLASSES.items() if second or part not in SECOND}
    for part, name in classes.items():
        found = _class_of(index, part)
        if found != name:
            kind = index.get("_class_name", "a pipeline")
            raise InputError(f"{folder} holds a {kind} whose {part} is {found}; one with {name} is wanted")
    weights = {part: _weight_files(folder, part) for part in classes}
    checkpoint = Checkpoint(folder, index, weights, _variant(weights))
    for part in checkpoint.parts:
        _require_config(folder, part)
    for path in (path for paths in weights.values() for path in paths):
        check_safetensors(path)
    _check_manifest(folder, hashes=False)
    if verify:
        checkpoint.verify()
    return checkpoint


def check_safetensors(path: Path) -> dict[str, Any]:
    """Compare a safetensors file's size with what its header promises, reading the header alone; returns the header.

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
            header: dict[str, Any] = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            promised = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
            whole = all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in entries)
            whole &= all(isinstance(side, int) for entry in entries for side in entry["shape"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise torn from error
    if not whole or not isinstance(header.get("__metadata__") or {}, dict):
        raise torn
    if promised != size:
        raise InputError(f"{path} is torn: {size} bytes where its header promises {promised}; fetch or train it again")
    return header


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


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class that model_index.json names for a part; a part that is absent is [null, null] there, or not there."""
    entry = index.get(part)
    found = entry[-1] if isinstance(entry, list) and entry else entry
    return None if found is None else str(found)


def _variant(weights: Mapping[str, tuple[Path, ...]]) -> str | None:
    return next((variant for paths in weights.values() if (variant := variant_of(paths[0]))), None)


def variant_of(file: Path) -> str | None:
    """ "fp16" where a file of weights, or a shard of them, is named so."""
    return "fp16" if re.search(r"\.fp16[.-]", file.name) else None


def _index(shard: Path) -> Path:
    """The file that names a shard beside others."""
    stem = re.split(r"(?:\.fp16)?-\d+-of-", shard.name)[0]
    return shard.with_name(f"{stem}.safetensors.index{'.fp16' if variant_of(shard) else ''}.json")


def _touched(path: Path) -> tuple[int, int]:
    """What tells that a file was written: its size and time."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _state(folder: Path) -> object:
    """What tells that no file of the manifest, nor it itself, has been touched: sizes, times and places on the disk."""
    manifest = read_manifest(folder)
    paths = [folder / name for name in manifest["files"]]
    said = [path.stat() if path.is_file() else None for path in paths]
    return manifest, [each and (each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for each in said]


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
    """The safetensors files of one network: whole, or the shards an index names; else the same in fp16 naming."""
    place, stem = folder / part, STEMS[part]
    for variant in ("", ".fp16"):
        if (place / f"{stem}{variant}.safetensors").is_file():
            return (place / f"{stem}{variant}.safetensors",)
        shards = place / f"{stem}.safetensors.index{variant}.json"
        if shards.is_file():
            return _shards(folder, shards)
    for path in sorted(place.glob("*")) if place.is_dir() else ():
        if path.suffix in PICKLES:
            raise InputError(
                f"{path} is a pickle, which can run code when opened; convert it to {stem}.safetensors first"
            )
    raise InputError(f"{folder} is not whole: {part}/{stem}.safetensors is missing")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} names no weights; fetch it again")
    paths = tuple(index.with_name(str(name)) for name in sorted({str(name) for name in names.values()}))
    for path in paths:
        if path.name != str(path.relative_to(index.parent)) or not path.is_file():
            raise InputError(f"{folder} is not whole: {path.relative_to(folder)} is missing")
    return paths


def _require_config(folder: Path, part: str) -> None:
    """Every part's settings are there: one of the listed sets of files."""
    sets = {
        "tokenizer": TOKENIZERS,
        "scheduler": (("scheduler_config.json",),),
    }.get(part.removesuffix("_2"), (("config.json",),))
    if not any(all((folder / part / name).is_file() for name in names) for names in sets):
        raise InputError(f"{folder} is not whole: {part}/{sets[0][0]} is missing")
