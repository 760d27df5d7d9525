"""A pipeline is written as one safetensors file in the original (LDM) key layout, with its configs in the header."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latentgen.checkpoint.folder import Checkpoint
from latentgen.checkpoint.keys import CLIP, OPENCLIP, from_diffusers, prefix
from latentgen.checkpoint.single import METADATA
from latentgen.durable import saying_what_failed, sync_folder
from latentgen.errors import InputError

if TYPE_CHECKING:
    import torch


def write_single(source: Checkpoint, target: Path) -> Path:
    """Write a folder's networks into `target`, aside and then renamed; tensors keep the type they are stored in.

    The tokenizers are laid into the folder of the file's name, without its suffix, where they are looked for. A text
    tower is written in OpenAI's form where it is Stable Diffusion 1's or XL's first, else in OpenCLIP's.
    Raises InputError for a network that the original layout has no names for, and where it cannot be written.
    """
    from safetensors.torch import save_file

    second = source.has_second
    tensors: dict[str, torch.Tensor] = {}
    for part in source.weights:
        form = _tower(source, part)
        start = prefix(part, second, form)
        tensors |= {start + name: value.contiguous() for name, value in _original(source, part, form)}
    configs = {part: source.config(part) for part in (*source.weights, "scheduler")}
    told = {"configs": configs, "force_zeros": bool(source.index.get("force_zeros_for_empty_prompt", True))}
    aside = target.with_name(f".{target.name}.writing")
    with saying_what_failed(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, aside, {"format": "pt", METADATA: json.dumps(told)})
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            for part in ("tokenizer", *(["tokenizer_2"] if second else [])):
                shutil.copytree(source.tokenizer(part), target.with_suffix("") / part, dirs_exist_ok=True)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(target.parent)
    return target


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
