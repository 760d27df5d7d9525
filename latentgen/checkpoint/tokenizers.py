"""The files of a CLIP tokenizer: which they are, and how they say what a text is padded with."""

import json
import shutil
from pathlib import Path

from latentgen.checkpoint.folder import read_json

FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
OPENCLIP_PAD = "!"  # OpenCLIP pads with its word 0


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder."""
    return [folder / name for name in FILES if (folder / name).is_file()]


def copy_tokenizer(source: Path, target: Path, pad: str | None = None) -> None:
    """Copy a tokenizer's files into a new folder; pad: what they shall say a text is padded with."""
    target.mkdir(parents=True)
    for path in tokenizer_files(source):
        shutil.copyfile(path, target / path.name)
    if pad is None:
        return
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = read_json(target / name) if (target / name).is_file() else None
        if said is not None or name == "tokenizer_config.json":
            _write(target / name, {**(said or {"tokenizer_class": "CLIPTokenizer"}), "pad_token": pad})
    if (target / "tokenizer.json").is_file():
        whole = read_json(target / "tokenizer.json")
        number = ((whole.get("model") or {}).get("vocab") or {}).get(pad)
        if whole.get("padding") and number is not None:
            whole["padding"] |= {"pad_id": number, "pad_token": pad}
            _write(target / "tokenizer.json", whole)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
