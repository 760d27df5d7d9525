"""Where a folder's graphs are: beside its weights, else in the user's cache; and what this engine cannot open."""

import importlib.util
import os
from pathlib import Path

from latentgen.checkpoint import Checkpoint, SingleFile

GRAPHS = {"text_encoder": "model.onnx", "unet": "model.onnx", "vae": "decoder.onnx"}  # each beside its weights
FORM = 1  # of the graphs; one more whenever what is exported changes, so that old ones in caches are left alone


def graph_paths(folder: Path) -> dict[str, Path]:
    """Each network's graph inside a folder, whether it is there or not."""
    return {part: folder / part / name for part, name in GRAPHS.items()}


def cache_folder(checkpoint: Checkpoint) -> Path:
    """Where the graphs of a folder that has none are kept: below $XDG_CACHE_HOME, named by what the folder holds."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "latentgen" / "onnx" / f"{checkpoint.fingerprint[:32]}-{FORM}"


def find_graphs(checkpoint: Checkpoint) -> dict[str, Path] | None:
    """The three graphs of a checkpoint, its own or the cache's; None where they are still to be exported."""
    own = graph_paths(checkpoint.folder)
    if all(path.is_file() for path in own.values()):
        return own
    kept = graph_paths(cache_folder(checkpoint))
    return kept if all(path.is_file() for path in kept.values()) else None


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
