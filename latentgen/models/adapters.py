"""Weights to be trained inside finished networks: PEFT's adapters, or the networks' own; and their files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from latentgen.checkpoint.tensors import save_tensors
from latentgen.errors import InputError
from latentgen.models.prompt import EMBEDDING

NAME = "default"
LORA_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
OUTSIDE = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding", "time_proj")
TOWER = "text_model."


class Trained(nn.Module):
    """The weights of some networks that are trained, and those alone: what a training run counts, averages and saves.

    weights: by name; "/" stands where a network's own name has ".". networks: follow into training and eval mode.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], networks: Iterable[nn.Module]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name.replace(".", "/"), weight)
        self.__dict__["networks"] = tuple(networks)  # not modules of this one: their other weights are nobody's here

    def train(self, mode: bool = True) -> Trained:
        """As torch's, for the networks too."""
        for network in self.__dict__.get("networks", ()):
            network.train(mode)
        return super().train(mode)


def add_adapter(network: nn.Module, kind: str, rank: int, layers: Iterable[str], seed: int) -> None:
    """Put a PEFT adapter beside a network's layers, without effect until it is trained.

    kind: "lora", "dora" or "lokr". The first numbers depend on the seed alone. alpha is the rank, so that the change
    is what the file's tensors multiply to, whoever reads them.
    """
    from peft import LoKrConfig, LoraConfig, inject_adapter_in_model

    chosen = list(layers)
    torch.manual_seed(seed)
    config: Any
    if kind == "lokr":
        config = LoKrConfig(r=rank, alpha=rank, target_modules=chosen, decompose_both=False)
    else:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen, use_dora=kind == "dora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, network, adapter_name=NAME)


@contextmanager
def without_adapter(network: nn.Module) -> Iterator[None]:
    """Inside, the network answers as it did before `add_adapter`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def layers_of(unet: nn.Module, targets: str) -> list[str]:
    """The names of the layers of a U-Net that adapters change: of its attention, or every one within its blocks."""
    kinds = nn.Linear | nn.Conv2d
    inside = [name for name, layer in unet.named_modules() if isinstance(layer, kinds) and not name.startswith(OUTSIDE)]
    if targets == "all":
        return inside
    return [name for name in inside if name.endswith(tuple(f".{layer}" for layer in ATTENTION))]


def text_layers(tower: nn.Module) -> list[str]:
    """The names of the layers of a text encoder's attention."""
    return [name for name, _ in tower.named_modules() if name.endswith(tuple(f".{layer}" for layer in TEXT_ATTENTION))]


def trained_weights(network: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """The weights of a network that require gradients, by the part's name and their own."""
    return {f"{part}.{name}": weight for name, weight in network.named_parameters() if weight.requires_grad}


def adapter_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """An adapter's tensors as PEFT saves them: {"down_blocks.….lora_A.weight": …}, float16 on the host."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=NAME)
    return {name: value.detach().half().cpu().contiguous() for name, value in state.items()}


def write_adapter(folder: Path, kind: str, networks: Mapping[str, nn.Module]) -> Path:
    """Write the adapters of "unet" and, it may be, the text encoders into a folder; gives the file.

    LoRA and DoRA in diffusers' form; LoKr, which diffusers has no form for, as PEFT writes one network's.
    """
    tensors = {part: adapter_tensors(network) for part, network in networks.items()}
    for part, held in tensors.items():
        for name, value in held.items():
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"{part}: {name} is not finite; the training diverged, nothing was written")
    if kind == "lokr":
        config = next(iter(networks["unet"].peft_config.values())).to_dict()  # type: ignore[operator]
        config |= {"target_modules": sorted(config["target_modules"]), "inference_mode": True}
        told = json.dumps(config, indent=2, default=str, sort_keys=True)
        (folder / "adapter_config.json").write_text(told + "\n", encoding="utf-8")
        save_tensors({f"base_model.model.{name}": value for name, value in tensors["unet"].items()}, folder / PEFT_FILE)
        return folder / PEFT_FILE
    named: dict[str, torch.Tensor] = {}
    for part, held in tensors.items():
        for name, value in held.items():
            bare = name if part == "unet" or name.startswith(TOWER) else f"{TOWER}{name}"
            named[f"{part}.{bare}"] = value
    save_tensors(named, folder / LORA_FILE, {"format": "pt"})
    return folder / LORA_FILE


def stock_pictures(
    base: Path,
    adapter: Path | None,
    kind: str | None,
    token: str | None,
    call: Mapping[str, Any],
    variant: str | None = None,
    ddim: bool = False,
) -> Any:
    """What stock diffusers renders, (B, H, W, 3) in [0, 1]. base: a pipeline folder, its files of a `variant`; adapter:
    a folder as it was written here, of a kind ("lora", "dora", "lokr"), or with a new word `token`; call: the
    pipeline's arguments; ddim: whether by DDIM instead of the folder's own scheduler.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline

    from latentgen.models.loading import quiet
    from latentgen.models.text import bound

    with quiet():
        pipe: Any = DiffusionPipeline.from_pretrained(
            base, safety_checker=None, torch_dtype=torch.float32, variant=variant
        )
        pipe.set_progress_bar_config(disable=True)
        for end in ("", "_2") if hasattr(pipe, "tokenizer_2") else ("",):
            bound(getattr(pipe, f"tokenizer{end}"), getattr(pipe, f"text_encoder{end}"))
        if ddim:
            pipe.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipe.scheduler.config})
        if adapter is not None and token is not None:
            _teach(pipe, adapter / EMBEDDING, token)
        elif adapter is not None and kind == "lokr":
            from peft import PeftModel

            pipe.unet = PeftModel.from_pretrained(pipe.unet, adapter).merge_and_unload()
        elif adapter is not None:
            pipe.load_lora_weights(adapter, weight_name=LORA_FILE)
        return pipe(**call, output_type="np").images


def _teach(pipe: Any, file: Path, token: str) -> None:
    """A new word in stock diffusers, which for Stable Diffusion XL takes each text encoder's vectors by themselves."""
    held = load_file(file)
    if len(held) == 1:
        pipe.load_textual_inversion(file)
        return
    towers = (pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)
    for vectors, (tower, words) in zip((held["clip_l"], held["clip_g"]), towers, strict=True):
        pipe.load_textual_inversion(vectors, token=token, text_encoder=tower, tokenizer=words)
