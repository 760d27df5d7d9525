"""A prompt becomes a condition: tokens, then the hidden states the U-Net attends to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch

from latentgen.checkpoint import OPENCLIP, Checkpoint, SingleFile
from latentgen.checkpoint.tokenizers import OPENCLIP_PAD
from latentgen.diffusion.denoiser import Condition
from latentgen.errors import InputError
from latentgen.models.loading import load_module, quiet
from latentgen.models.memory import encoded
from latentgen.models.prompt import Laid, ReadsPrompts, Token, Window, sheet


@dataclass(frozen=True)
class TextEncoder(ReadsPrompts):
    """A CLIP tokenizer and text tower (Radford et al. 2021), used as `diffusers.StableDiffusionPipeline` uses them.

    tokenizer: CLIPTokenizer. model: CLIPTextModel, or CLIPTextModelWithProjection; its device is where conditions are
    made. raw: the states before the last layer, without the final norm, as Stable Diffusion XL takes them; else the
    last ones, normed. learned: the first id of a new word -> the ids of all its vectors. Gradients are recorded where
    the model is in training mode.
    """

    skips: ClassVar[bool] = True  # whether layers can be left away
    tokenizer: Any
    model: Any
    raw: bool = False
    learned: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, second: bool = False) -> Self:
        """A tokenizer and text encoder of a checkpoint, the first or the second."""
        suffix = "_2" if second else ""
        with quiet():
            from transformers import (  # in transformers 5 the fast tokenizer is the only one
                CLIPTextModel,
                CLIPTextModelWithProjection,
                CLIPTokenizerFast,
            )

            folder = checkpoint.tokenizer(f"tokenizer{suffix}")
            alone = isinstance(checkpoint, SingleFile) and checkpoint.tower(f"text_encoder{suffix}") == OPENCLIP
            padding = {"pad_token": OPENCLIP_PAD} if alone else {}
            try:
                tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True, **padding)
            except Exception as error:  # the Rust reader raises bare Exceptions for a torn tokenizer.json
                raise InputError(
                    f"{folder} cannot be read as a CLIP tokenizer: {str(error).splitlines()[0]}"
                ) from error
        kind = CLIPTextModelWithProjection if second else CLIPTextModel
        model = load_module(kind, checkpoint, f"text_encoder{suffix}", device, dtype)
        bound(tokenizer, model)
        return cls(tokenizer, model, raw=checkpoint.has_second)

    @property
    def towers(self) -> tuple["TextEncoder", ...]:
        """This one."""
        return (self,)

    @property
    def window(self) -> Window:  # type: ignore[override]
        """What the tower sees at once."""
        marks = self.tokenizer
        length = min(int(marks.model_max_length), int(self.model.config.max_position_embeddings))
        return Window(length, marks.bos_token_id, marks.eos_token_id, marks.pad_token_id)

    def tokens(self, text: str) -> list[Token]:
        """A text's tokens, without marks."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [Token(id, *span) for first, span in pairs for id in self.learned.get(first, (first,))]

    def encode(
        self, prompts: Sequence[str], *, weights: bool = False, limit: int | None = 1, skip: int = 0
    ) -> Condition:
        """states (B, K·L, D), the last hidden states after the final norm; each distinct chunk is encoded once.

        K is the number of chunks, 1 unless `limit` allows more. A chunk is padded to L tokens; what the last one cannot
        hold is cut, and known from `lay`. skip: how many layers at the end are left away (diffusers' clip_skip).
        """
        laid = {prompt: self.lay(prompt, weights=weights, limit=limit) for prompt in dict.fromkeys(prompts)}
        chunks = sheet([laid[prompt] for prompt in prompts], self.window)
        told = torch.stack([torch.from_numpy(chunks.ids), torch.from_numpy(chunks.mask).to(torch.int64)], dim=1)
        states, *embedded = encoded(partial(self._states, skip=skip), told.to(self.model.device))
        pooled = chunks.pooled(embedded[0]) if embedded else None
        return Condition(states=chunks.states(states), pooled=pooled)  # (chunks, L, D) -> (B, K·L, D)

    def _states(self, told: torch.Tensor, skip: int) -> list[torch.Tensor]:
        """States (N, L, D) and, where the tower has them, embeddings (N, P) of ids and mask (N, 2, L)."""
        masked = getattr(self.model.config, "use_attention_mask", False)
        with torch.set_grad_enabled(self.model.training and torch.is_grad_enabled()):
            mask = told[:, 1] if masked else None
            out = self.model(told[:, 0], attention_mask=mask, output_hidden_states=self.raw or skip > 0)
            states = states_of(self.model, out, raw=self.raw, skip=skip)
        embedded = getattr(out, "text_embeds", None)
        return [states.float()] if embedded is None else [states.float(), embedded.float()]

    def given(self, states: Any, pooled: Any = None) -> Condition:
        """Prompt embeddings somebody brought (an array (B, L, D)) as a condition on this encoder's device."""
        if pooled is not None:
            raise InputError("pooled_prompt_embeds are for Stable Diffusion XL; these weights take prompt_embeds alone")
        return Condition(states=torch.as_tensor(states, device=self.model.device).float())


@dataclass(frozen=True)
class TwoTextEncoders:
    """Stable Diffusion XL's pair (Podell et al. 2023, section 2.1): states side by side, pooled from the second.

    zeros: no negative prompt is all zeros, as the base model was trained; an empty one that was given is encoded.
    """

    skips: ClassVar[bool] = True
    first: TextEncoder
    second: TextEncoder
    zeros: bool = True

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Self:
        """Both tokenizers and towers of a checkpoint."""
        first, second = (TextEncoder.load(checkpoint, device, dtype, second=which) for which in (False, True))
        return cls(first, second, bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)))

    @property
    def towers(self) -> tuple[TextEncoder, ...]:
        """Both."""
        return (self.first, self.second)

    @property
    def length(self) -> int:
        """The context length L in tokens, the start and end marks included."""
        return min(self.first.length, self.second.length)

    @property
    def model(self) -> Any:
        """The first tower."""
        return self.first.model

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer."""
        return self.first.tokenizer

    def lay(self, prompt: str, *, weights: bool = False, limit: int | None = 1) -> Laid:
        """A prompt as the first tower's chunks; the second's are alike, but for padding."""
        return self.first.lay(prompt, weights=weights, limit=limit)

    def encode(
        self, prompts: Sequence[str], *, weights: bool = False, limit: int | None = 1, skip: int = 0
    ) -> Condition:
        """states (B, K·L, D1 + D2), pooled (B, P), which no skipping changes."""
        how: dict[str, Any] = {"weights": weights, "limit": limit, "skip": skip}
        one, other = (each.encode(prompts, **how) for each in (self.first, self.second))
        assert one.states is not None and other.states is not None
        return Condition(states=torch.cat([one.states, other.states], dim=-1), pooled=other.pooled)

    def empty(self, condition: Condition) -> Condition:
        """What stands for no negative prompt: all zeros of the condition's shapes, where the model wants that."""
        if not self.zeros or condition.states is None or condition.pooled is None:
            return condition
        return Condition(torch.zeros_like(condition.states), torch.zeros_like(condition.pooled))

    def given(self, states: Any, pooled: Any = None) -> Condition:
        """Prompt embeddings somebody brought, (B, L, D1 + D2), and pooled ones (B, P)."""
        if pooled is None:
            raise InputError("Stable Diffusion XL needs pooled_prompt_embeds beside prompt_embeds; give both")
        place = self.first.model.device
        brought = (torch.as_tensor(value, device=place).float() for value in (states, pooled))
        return Condition(*brought)

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, the start and end marks included."""
        return self.first.count(prompt)

    def cut(self, prompt: str) -> str:
        """The words of a prompt that lie beyond the context length."""
        return self.first.cut(prompt)


def bound(tokenizer: Any, model: Any) -> None:
    """Keep a tokenizer to what its tower can read: one that states no bound has 1e30, which it cannot pad to itself."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)


def states_of(model: Any, out: Any, *, raw: bool, skip: int) -> torch.Tensor:
    """The states (N, L, D) of a tower's output. raw, skip: as `TextEncoder` has and takes them."""
    states: torch.Tensor
    if raw:
        states = out.hidden_states[-2 - skip]
    elif skip:
        tower = getattr(model, "text_model", model)  # before transformers 5 had them in one
        states = tower.final_layer_norm(out.hidden_states[-1 - skip])
    else:
        states = out.last_hidden_state
    return states


def whole_sizes(height: int, width: int, pooled: torch.Tensor) -> torch.Tensor:
    """What Stable Diffusion XL is told of whole pictures of a size in pixels: (B, 6), where `pooled` (B, P) lives."""
    told = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=pooled.device)
    return told.expand(len(pooled), -1)


def load_text(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextEncoder | TwoTextEncoders:
    """What a checkpoint's prompts go through."""
    kind = TwoTextEncoders if checkpoint.has_second else TextEncoder
    return kind.load(checkpoint, device, dtype)
