"""The weights a fine-tuning run starts from, opened for training: float32, torch, nothing of the folder is changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentgen.checkpoint import Checkpoint, find, open_checkpoint, read_json
from latentgen.diffusion.sampling import TABLE
from latentgen.diffusion.schedule.plan import Plan, from_config
from latentgen.diffusion.schedule.reading import as_pipelines_take, known
from latentgen.errors import InputError
from latentgen.finetuning.settings import Finetune, Start
from latentgen.models.latent import Latent
from latentgen.models.network import attend_plainly, load_unet, unet_network
from latentgen.models.text import TextEncoder, TwoTextEncoders, load_text
from latentgen.output import identity
from latentgen.pipeline import Pipeline, terms_of

RANDOM = frozenset(note.name for note in TABLE if note.random)  # samplers that draw noise at each step
PLAINLY = 1024  # places of a latent up to which attention without the fused kernel trains faster on a CPU

# What the starting weights are looked at with where they bring no prompts of their own.
PROMPTS = ("a red apple", "a cat", "a house", "a smiling face", "a car", "a tree", "the sun", "a bird")


@dataclass(frozen=True)
class Base:
    """Opened weights: `pipe` renders with the modules as they are at the moment, `unet` and `text` being its own."""

    checkpoint: Checkpoint
    place: str | Path | None
    unet: Any
    text: TextEncoder | TwoTextEncoders
    latent: Latent
    pipe: Pipeline
    plan: Plan

    @classmethod
    def open(cls, path: str | Path | None, settings: Finetune, device: torch.device) -> "Base":
        """Raises InputError for weights that cannot be opened, or that the method does not fit."""
        checkpoint = open_checkpoint(find(path))
        _check_fit(checkpoint, settings)
        unet = load_unet(checkpoint, device, torch.float32).to(memory_format=torch.channels_last)  # as it is taught
        text = load_text(checkpoint, device, torch.float32)
        latent = Latent.load(checkpoint, device, torch.float32)
        terms = terms_of(checkpoint)
        if device.type == "cpu" and (terms.size // terms.factor) ** 2 <= PLAINLY:
            attend_plainly(unet)
        scheduler = checkpoint.config("scheduler")
        weights = identity(checkpoint, path)
        taken = as_pipelines_take(scheduler, checkpoint.has_second)
        pipe = Pipeline(text, unet_network(unet), latent, taken, terms, weights)
        return cls(checkpoint, path, unet, text, latent, pipe, from_config(known(scheduler)))

    @property
    def count(self) -> int:
        """Weights of the U-Net."""
        return sum(weight.numel() for weight in self.unet.parameters())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it was made by, where that stands beside it."""
        path = self.checkpoint.folder / "recipe.json"
        return read_json(path) if path.is_file() else {}

    @property
    def start(self) -> Start:
        """What the choices of a run depend on."""
        times = {key: value for key, value in self.recipe.get("unet", {}).items() if key.startswith("times")}
        return Start(self.count, self.pipe.terms.size, **times)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What it was looked at with while it was made, or plain things."""
        return tuple(self.recipe.get("sample", {}).get("prompts") or PROMPTS)

    @property
    def sampler(self) -> str:
        """What it is proved with: the one its scheduler's config names, or DDIM where that draws noise at each step."""
        return "ddim" if self.plan.sampler in RANDOM else self.plan.sampler

    def saved_parts(self) -> Mapping[str, Any]:
        """Everything but the U-Net, as `checkpoint.save_pipeline` takes it."""
        parts: dict[str, Any] = {"vae": self.latent.vae, "scheduler_config": self.checkpoint.config("scheduler")}
        if isinstance(self.text, TwoTextEncoders):
            first, second = self.text.first, self.text.second
            parts |= {"tokenizer": first.tokenizer, "text_encoder": first.model}
            parts |= {"tokenizer_2": second.tokenizer, "text_encoder_2": second.model}
            return parts | {"force_zeros_for_empty_prompt": self.text.zeros}
        return parts | {"tokenizer": self.text.tokenizer, "text_encoder": self.text.model}


def _check_fit(checkpoint: Checkpoint, settings: Finetune) -> None:
    if checkpoint.config("unet").get("time_cond_proj_dim"):
        raise InputError(
            f"{checkpoint.folder} is guidance-distilled (its U-Net is told the guidance scale), which finetune cannot "
            "keep up; start from the model it was distilled from"
        )
    if settings.text_encoder and settings.adapter == "lokr":
        raise InputError("text_encoder is not trained with lokr, which has no file form for it; use lora")
