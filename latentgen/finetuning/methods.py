"""What is trained: an adapter, the networks' own weights, or a new word; and the files it becomes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentgen.checkpoint import save_pipeline, write_folder
from latentgen.checkpoint.write import TEXT
from latentgen.diffusion.denoiser import Condition, Network
from latentgen.finetuning.base import Base
from latentgen.finetuning.settings import Finetune
from latentgen.models.adapters import (
    Trained,
    add_adapter,
    layers_of,
    text_layers,
    trained_weights,
    without_adapter,
    write_adapter,
)
from latentgen.models.inversion import new_words, start_vectors, teach, vectors_of, write_embedding
from latentgen.models.network import unet_network
from latentgen.models.onnx.export import write_graphs
from latentgen.models.onnx.places import why_not
from latentgen.models.text import TextEncoder, TwoTextEncoders
from latentgen.pipeline import Pipeline

Finish = Callable[[Path], None]  # called on the folder while it lies aside; what it raises leaves nothing behind


@dataclass(frozen=True)
class Trainee:
    """module: every weight that is trained. live: whether texts have to be encoded anew at every step.

    settle: bring the weights to what the file will hold. save(out, finish): write the folder, whole or not at all.
    reopen(folder): what it is to render with what was saved, from nothing. teacher: the starting weights' network,
    where their answers are kept to.
    """

    module: nn.Module
    live: bool
    settle: Callable[[], None]
    save: Callable[[Path, Finish], Path]
    reopen: Callable[[Path], Pipeline]
    teacher: Network | None = None


def make_trainee(base: Base, settings: Finetune) -> Trainee:
    """The weights that the method trains, put into the opened networks; settings: with nothing left open."""
    if settings.method == "textual-inversion":
        return _word(base, settings)
    if settings.adapter is not None:
        return _adapter(base, settings, settings.adapter)
    return _whole(base, settings)


def _pipe(base: Base) -> Pipeline:
    """The starting weights, opened anew."""
    device = base.unet.device
    return Pipeline.from_pretrained(base.place, engine="torch", device=device, dtype="float32")


def _networks(base: Base, settings: Finetune) -> dict[str, Any]:
    networks = {"unet": base.unet}
    if settings.text_encoder:
        networks |= zip(TEXT, (tower.model for tower in base.text.towers), strict=False)
    return networks


def _adapter(base: Base, settings: Finetune, kind: str) -> Trainee:
    assert settings.rank is not None and settings.targets is not None
    networks = _networks(base, settings)
    for part, network in networks.items():
        unet = part == "unet"
        layers = layers_of(network, settings.targets) if unet else text_layers(network)
        # text encoders beside DoRA: plain LoRA, as stock diffusers reads their magnitudes from no file
        add_adapter(network, kind if unet else "lora", settings.rank, layers, settings.seed)
        network.to(base.unet.device)
    weights = _trained(networks)

    def save(out: Path, finish: Finish) -> Path:
        def write(aside: Path) -> None:
            write_adapter(aside, kind, networks)
            finish(aside)

        return write_folder(out, write)

    def reopen(folder: Path) -> Pipeline:
        pipe = _pipe(base)
        pipe.load_lora(folder)
        return pipe

    def before(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        with without_adapter(base.unet):
            return unet_network(base.unet, gradients=False)(x, time, condition)

    module = Trained(weights, networks.values())

    @torch.no_grad()
    def settle() -> None:
        for name, weight in weights.items():
            if settings.strength is not None and ".lora_B." in name:
                weight.mul_(settings.strength)
        halve(module)

    teacher = before if settings.prior == "answers" else None
    return Trainee(module, settings.text_encoder, settle, save, reopen, teacher)


@torch.no_grad()
def halve(module: nn.Module) -> None:
    """Round the weights to what half precision holds: it is what is stored, and wider ones make other pictures."""
    for weight in module.parameters():
        weight.copy_(weight.half().float())


def _trained(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {name: weight for part, each in networks.items() for name, weight in trained_weights(each, part).items()}


def _whole(base: Base, settings: Finetune) -> Trainee:
    networks = _networks(base, settings)
    teacher = None
    if settings.prior == "answers":
        teacher = unet_network(copy.deepcopy(base.unet).requires_grad_(False).eval())
    for network in networks.values():
        network.requires_grad_(True)
    weights = _trained(networks)
    module = Trained(weights, networks.values())

    def settle() -> None:
        """Of what was not trained as well: all of it is stored in half precision."""
        for network in (base.unet, base.latent.vae, *(tower.model for tower in base.text.towers)):
            halve(network)

    def save(out: Path, finish: Finish) -> Path:
        def after(aside: Path) -> None:
            if why_not(base.checkpoint) is None:
                write_graphs(aside)
            finish(aside)

        return save_pipeline(out, unet=base.unet, **base.saved_parts(), extra_files=_extras(base), finish=after)

    def reopen(folder: Path) -> Pipeline:
        return Pipeline.from_pretrained(folder, engine="torch", device=base.unet.device, dtype="float32")

    return Trainee(module, settings.text_encoder, settle, save, reopen, teacher)


def _extras(base: Base) -> dict[str, bytes | str]:
    """What of the starting folder still holds: its defaults and size; whose pictures it was made from."""
    return {
        name: path.read_bytes()
        for name in ("latentgen.json", "recipe.json")
        if (path := base.checkpoint.folder / name).is_file()
    }


def _word(base: Base, settings: Finetune) -> Trainee:
    assert settings.token is not None
    words = new_words(base.text, settings.token, first_vectors(base.text, settings))

    def save(out: Path, finish: Finish) -> Path:
        def write(aside: Path) -> None:
            write_embedding(aside, str(settings.token), vectors_of(words))
            finish(aside)

        return write_folder(out, write)

    def reopen(folder: Path) -> Pipeline:
        pipe = _pipe(base)
        pipe.load_textual_inversion(folder)
        return pipe

    return Trainee(_Both(words, base.unet), True, lambda: None, save, reopen)


class _Both(nn.Module):
    """A new word's vectors, and a network that gradients pass through on their way to them."""

    def __init__(self, words: nn.ModuleList, network: nn.Module) -> None:
        super().__init__()
        self.words = words
        self.__dict__["network"] = network

    def train(self, mode: bool = True) -> "_Both":
        self.__dict__["network"].train(mode)
        return super().train(mode)


def first_vectors(text: TextEncoder | TwoTextEncoders, settings: Finetune) -> list[torch.Tensor]:
    """What a new word starts as: (vectors, D) for each text encoder."""
    assert settings.vectors is not None
    return [start_vectors(tower, settings.like, settings.vectors, settings.seed) for tower in text.towers]


def untrained(base: Base, settings: Finetune) -> Pipeline:
    """The starting weights for comparison: a new word is there what it starts as."""
    pipe = _pipe(base)
    if settings.method == "textual-inversion":
        assert settings.token is not None
        assert isinstance(pipe.text, TextEncoder | TwoTextEncoders)
        teach(pipe.text, settings.token, first_vectors(pipe.text, settings))
    return pipe
