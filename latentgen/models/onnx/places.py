"""Where a folder's graphs are: beside its weights, else in the user's cache; and what this engine cannot open."""

import hashlib
import importlib.util
import os
from pathlib import Path

from latentgen.checkpoint import Checkpoint, SingleFile

GRAPHS = {"text_encoder": "model.onnx", "unet": "model.onnx", "vae": "decoder.onnx"}  # each beside its weights
LAYOUT = "latentgen.layout"  # the key in a graph's metadata under which it says its layout
FORM = 1  # of the graphs; one more whenever what is exported changes, so that old ones in caches are left alone


def graph_paths(folder: Path) -> dict[str, Path]:
    """Each network's graph inside a folder, whether it is there or not."""
    return {part: folder / part / name for part, name in GRAPHS.items()}


def cache_folder(checkpoint: Checkpoint) -> Path:
    """Where the graphs of a folder that has none are kept: below $XDG_CACHE_HOME, named by what the folder holds."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "latentgen" / "onnx" / f"{checkpoint.fingerprint[:32]}-{FORM}"


def find_graphs(folder: Path) -> dict[str, Path] | None:
    """The three graphs inside a weights folder or a cache's; None where not all are there."""
    paths = graph_paths(folder)
    return paths if all(path.is_file() for path in paths.values()) else None


def layout(checkpoint: Checkpoint, part: str) -> str:
    """A hash of what a network's graph depends on: its config, and where in which file each tensor lies.

    The graph says for which layout it was made; it would read other files' bytes as weights that they are not.
    """
    digest = hashlib.blake2b((checkpoint.folder / part / "config.json").read_bytes(), digest_size=16)
    for file in checkpoint.weights[part]:
        with file.open("rb") as opened:
            head = opened.read(8)
            digest.update(file.name.encode() + head + opened.read(int.from_bytes(head, "little")))
    return digest.hexdigest()


def why_not(checkpoint: Checkpoint) -> str | None:
    """Why this engine cannot run a checkpoint, in a few words; None where it can."""
    missing = [name for name in ("onnxruntime", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if isinstance(checkpoint, SingleFile):
        return "it is a single file, not a weights folder"
    if checkpoint.has_second:
        return "Stable Diffusion XL has a second text encoder"
    if checkpoint.config("text_encoder").get("use_attention_mask"):
        return "its text encoder is told of padding"
    if not (checkpoint.tokenizer() / "tokenizer.json").is_file():
        return "its tokenizer has no tokenizer.json"
    return None
