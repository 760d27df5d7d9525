"""A prompt becomes a condition: tokens, then the hidden states the U-Net attends to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Condition
from latentgen.errors import InputError
from latentgen.models.loading import load_module, quiet
from latentgen.models.prompt import Laid, Token, Window, lay, literal, parse, sheet


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

    @property
    def window(self) -> Window:
        """What the tower sees at once."""
        marks = self.tokenizer
        return Window(self.length, marks.bos_token_id, marks.eos_token_id, marks.pad_token_id)

    def tokens(self, text: str) -> list[Token]:
        """A text's tokens, without marks."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [Token(id, *span) for id, span in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    def lay(self, prompt: str, *, weights: bool = False, limit: int | None = 1) -> Laid:
        """A prompt as chunks, `limit` at most. weights: brackets weigh, BREAK parts chunks; else all is text."""
        return lay(parse(prompt) if weights else literal(prompt), self.tokens, self.window, limit)

    def encode(self, prompts: Sequence[str], *, weights: bool = False, limit: int | None = 1) -> Condition:
        """states (B, K·L, D), the last hidden states after the final norm; each distinct chunk is encoded once.

        K is the number of chunks, 1 unless `limit` allows more. A chunk is padded to L tokens; what the last one cannot
        hold is cut, and known from `lay`.
        """
        laid = {prompt: self.lay(prompt, weights=weights, limit=limit) for prompt in dict.fromkeys(prompts)}
        chunks = sheet([laid[prompt] for prompt in prompts], self.window)
        ids = torch.from_numpy(chunks.ids).to(self.model.device)
        masked = getattr(self.model.config, "use_attention_mask", False)
        mask = torch.from_numpy(chunks.mask).to(self.model.device) if masked else None
        with torch.no_grad():
            states = self.model(ids, attention_mask=mask)[0]
        return Condition(states=chunks.states(states.float()))  # (chunks, L, D) -> (B, K·L, D)

    def given(self, states: Any) -> Condition:
        """Prompt embeddings somebody brought (an array (B, L, D)) as a condition on this encoder's device."""
        return Condition(states=torch.as_tensor(states, device=self.model.device).float())

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, the start and end marks included; more than `length` is cut."""
        return self.lay(prompt).count

    def cut(self, prompt: str) -> str:
        """The words of a prompt that lie beyond the context length, as they were written; "" where all fits."""
        return self.lay(prompt).lost
