"""Where a folder's graphs are: beside its weights, else in the user's cache; and what this engine cannot open."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentgen.checkpoint import Checkpoint, SingleFile, check_safetensors
from latentgen.durable import user_cache

GRAPHS = {"text_encoder": "model.onnx", "unet": "model.onnx", "vae": "decoder.onnx"}  # each beside its weights
SECOND = {"text_encoder_2": "model.onnx"}  # what Stable Diffusion XL has besides
TOLD = "told"  # the U-Net's second graph: what of the text each step needs; older folders have a whole U-Net instead
LAYOUT = "latentgen.layout"  # the key in a graph's metadata under which it says its layout
CHANGED = "latentgen.changed"  # the key there of the hash of the weights that LoRAs changed, which lie beside it
FORM = 2  # of the graphs; one more whenever what is exported changes, so that old ones in caches are left alone


def graph_paths(folder: Path, second: bool = False) -> dict[str, Path]:
    """Each network's graph inside a folder, whether it is there or not. second: whether there are two text encoders."""
    graphs = {part: folder / part / name for part, name in (GRAPHS | (SECOND if second else {})).items()}
    return graphs | {TOLD: folder / "unet" / f"{TOLD}.onnx"}


def weights_folder(checkpoint: Checkpoint, part: str) -> Path:
    """The folder of the files in which a network's weights are stored."""
    return checkpoint.weights[part][0].parent


def cache_folder(checkpoint: Checkpoint) -> Path:
    """Where the graphs of a folder that has none are kept: below $XDG_CACHE_HOME, named by what the folder holds."""
    return user_cache() / "onnx" / f"{checkpoint.fingerprint[:32]}-{FORM}"


def fused_folder(checkpoint: Checkpoint, loras: Sequence[Mapping[str, Any]]) -> Path:
    """Where the graphs of a checkpoint with LoRAs fused are kept: named by what all of them hold and their weights."""
    from latentgen.models.lora import read_lora
    from latentgen.models.lora.stack import read_loras

    uses = [[read_lora(one["path"]).sha256, one["weight"]] for one in read_loras(loras)]
    digest = hashlib.sha256(json.dumps([checkpoint.fingerprint, uses]).encode()).hexdigest()
    return cache_folder(checkpoint).with_name(f"{digest[:32]}-{FORM}-fused")


def fused_folders() -> list[Path]:
    """The folders of graphs with LoRAs fused in the user's cache, of any checkpoint."""
    return [*(user_cache() / "onnx").glob("*-fused")]


def skipping_path(checkpoint: Checkpoint, part: str, skip: int) -> Path:
    """Where the graph of a text encoder without its last `skip` layers is kept, in the user's cache."""
    return cache_folder(checkpoint) / part / f"skip-{skip}.onnx"


def find_graphs(folder: Path, second: bool = False) -> dict[str, Path] | None:
    """The graphs inside a weights folder or a cache's, `TOLD` only where it is; None where another is not there."""
    there = {part: path for part, path in graph_paths(folder, second).items() if path.is_file()}
    return there if len({*there} - {TOLD}) == len(GRAPHS) + second else None


def layout(checkpoint: Checkpoint, part: str) -> str:
    """A hash of what a network's graph depends on: its config, and where in which file each tensor lies.

    The graph says for which layout it was made; it would read other files' bytes as weights that they are not.
    """
    if isinstance(checkpoint, SingleFile):
        config = json.dumps(checkpoint.config(part), sort_keys=True).encode()
    else:
        config = (checkpoint.folder / part / "config.json").read_bytes()
    digest = hashlib.blake2b(config, digest_size=16)
    for file in checkpoint.weights[part]:
        with file.open("rb") as opened:
            head = opened.read(8)
            digest.update(file.name.encode() + head + opened.read(int.from_bytes(head, "little")))
    return digest.hexdigest()


def speaks_for_gpu() -> bool:
    """Whether there may be a GPU, on which torch would render instead."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def why_not(checkpoint: Checkpoint) -> str | None:
    """Why this engine cannot run a checkpoint, in a few words; None where it can."""
    missing = [name for name in ("onnxruntime", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    files = {file for files in checkpoint.weights.values() for file in files if file.is_file()}
    entries = (entry for file in files for entry in check_safetensors(file).values() if "dtype" in entry)
    if small := next((entry["dtype"] for entry in entries if entry["dtype"].startswith("F8")), None):
        return f"its weights are stored as {small}"
    if checkpoint.config("text_encoder").get("use_attention_mask"):
        return "its text encoder is told of padding"
    return None
