"""A pipeline is written as one safetensors file in the original (LDM) key layout, with its configs in the header."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from latentgen.checkpoint.folder import Checkpoint
from latentgen.checkpoint.keys import CLIP, OPENCLIP, from_diffusers, prefix
from latentgen.checkpoint.single import METADATA
from latentgen.checkpoint.tensors import save_tensors
from latentgen.checkpoint.tokenizers import tokenizer_files
from latentgen.durable import saying_what_failed, sync_folder
from latentgen.errors import InputError

if TYPE_CHECKING:
    import torch

# what diffusers once called the layers of an autoencoder's attention, as files of Stable Diffusion 1 and 2 still do
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(ATTENTION)})(?=\.)")


def write_single(source: Checkpoint, target: Path, told: Mapping[str, Any] = MappingProxyType({})) -> list[Path]:
    """Write a folder's networks into `target`, aside and then renamed; tensors keep the type they are stored in.

    The tokenizers' files are laid into the folder of the file's name, without its suffix, where they are looked for,
    unless that is the source itself. A text tower is written in OpenAI's form where it is Stable Diffusion 1's or XL's
    first, else in OpenCLIP's. told: what the scheduler's config shall say otherwise. Returns what was made: the file,
    and the tokenizers' folder where it was not there. Raises InputError for a network that the original layout has no
    names for, where it cannot be written, and where something else stands in the tokenizers' place.
    """
    second = source.has_second
    files = _tokenizer_files(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for part in source.weights:
        form = _tower(source, part)
        start = prefix(part, second, form)
        tensors |= {start + name: value.contiguous() for name, value in _original(source, part, form)}
    configs = {part: source.config(part) for part in (*source.weights, "scheduler")}
    configs["scheduler"] |= told
    force_zeros = bool(source.index.get("force_zeros_for_empty_prompt", True))
    header = {"configs": configs, "force_zeros": force_zeros, "extras": source.extras}
    aside = target.with_name(f".{target.name}.writing")
    beside = [target.with_suffix("")] if files else []
    with saying_what_failed(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_tensors(tensors, aside, {"format": "pt", METADATA: json.dumps(header)})
            with aside.open("rb") as written:
                os.fsync(written.fileno())
            for place, file in files.items():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
            aside.replace(target)
        except BaseException:
            remove_all(beside)
            raise
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(target.parent)
    return [target, *beside]


def remove_all(made: Iterable[Path]) -> None:
    """Remove files and folders, such as `write_single` says it made."""
    for path in made:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _tokenizer_files(source: Checkpoint, target: Path) -> dict[Path, Path]:
    """Where each of the tokenizers' files goes -> where it is; empty where all of them are there already."""
    folder = target.with_suffix("")
    if folder.exists() and source.folder.resolve() == folder.resolve():
        return {}
    found = {
        folder / part / file.name: file
        for part in source.parts
        if part.startswith("tokenizer")
        for file in tokenizer_files(source.tokenizer(part))
    }
    there = {path for path in folder.rglob("*") if not path.is_dir()} if folder.is_dir() else set()
    if there == {*found} and all(place.read_bytes() == file.read_bytes() for place, file in found.items()):
        return {}
    if there or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}, where the tokenizers of {target} go, holds something else; name another file")
    return found


def _tower(source: Checkpoint, part: str) -> str:
    """Stable Diffusion 2's tower has OpenCLIP's activation, which is how a folder tells it from 1's."""
    if part == "text_encoder_2":
        return OPENCLIP
    if part != "text_encoder" or source.has_second:
        return CLIP
    return OPENCLIP if source.config(part).get("hidden_act") == "gelu" else CLIP


def _original(source: Checkpoint, part: str, form: str) -> "Iterator[tuple[str, torch.Tensor]]":
    import torch
    from safetensors.torch import load_file

    state = {name: value for path in source.weights[part] for name, value in load_file(path).items()}
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    if part == "vae":
        state = {OLD.sub(lambda found: ATTENTION[found[1]], name): value for name, value in state.items()}
    stacked: dict[str, dict[int, torch.Tensor]] = {}
    for tie in from_diffusers(part, list(state), source.config(part), form):
        value = state[tie.diffusers]
        if tie.form == "third":
            stacked.setdefault(tie.ldm, {})[tie.third] = value
        elif tie.form == "flat":
            yield tie.ldm, value[:, :, None, None]
        else:
            yield tie.ldm, value.T if tie.form == "transposed" else value
    for name, thirds in stacked.items():
        if len(thirds) != 3:
            raise InputError(f"{source.folder}: {part} lacks a part of {name}; fetch or train it again")
        yield name, torch.cat([thirds[third] for third in range(3)])
