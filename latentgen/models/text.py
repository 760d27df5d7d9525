"""A prompt becomes a condition: tokens, then the hidden states the U-Net attends to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Condition
from latentgen.errors import InputError
from latentgen.models.loading import load_module, quiet


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP tokenizer and text tower (Radford et al. 2021), used as `diffusers.StableDiffusionPipeline` uses them.

    tokenizer: CLIPTokenizer. model: CLIPTextModel; its device is where conditions are made.
    """

    tokenizer: Any
    model: Any

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "TextEncoder":
        """The tokenizer and text encoder of a weights folder."""
        with quiet():
            from transformers import CLIPTextModel, CLIPTokenizerFast  # in transformers 5 the only one

            folder = checkpoint.folder / "tokenizer"
            try:
                tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # the Rust reader raises bare Exceptions for a torn tokenizer.json
                raise InputError(
                    f"{folder} cannot be read as a CLIP tokenizer: {str(error).splitlines()[0]}"
                ) from error
        return cls(tokenizer, load_module(CLIPTextModel, checkpoint, "text_encoder", device, dtype))

    @property
    def length(self) -> int:
        """The context length L in tokens, the start and end marks included."""
        return min(int(self.tokenizer.model_max_length), int(self.model.config.max_position_embeddings))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """states (B, L, D), the last hidden states after the final norm; each distinct prompt is encoded once.

        A prompt is padded, or cut, to L tokens; what is cut is known from `cut`.
        """
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        masked = getattr(self.model.config, "use_attention_mask", False)
        with torch.no_grad():
            states = self.model(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
        rows = [distinct.index(prompt) for prompt in prompts]
        return Condition(states=states[rows].float())  # (distinct, L, D) -> (B, L, D)

    def given(self, states: Any) -> Condition:
        """Prompt embeddings somebody brought (an array (B, L, D)) as a condition on this encoder's device."""
        return Condition(states=torch.as_tensor(states, device=self.model.device).float())

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, the start and end marks included; more than `length` is cut."""
        return len(self.tokenizer(prompt).input_ids)

    def cut(self, prompt: str) -> str:
        """The words of a prompt that lie beyond the context length, as they were written; "" where all fits."""
        if self.count(prompt) <= self.length:
            return ""
        spans = self.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        start = int(spans[self.length - 1][0])  # the end mark takes the last place, so this token is the first one lost
        words = prompt[start:]
        begun = prompt[:start].rfind(" ") + 1 if start and not prompt[start - 1].isspace() else start
        return (prompt[begun:] if prompt[begun:start].isalnum() else words).strip()
