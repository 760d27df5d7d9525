"""A prompt becomes a condition without torch: `tokenizers` reads it, ONNX Runtime encodes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from latentgen.checkpoint import OPENCLIP, Checkpoint, SingleFile
from latentgen.checkpoint.tokenizers import OPENCLIP_PAD
from latentgen.diffusion.denoiser import Condition
from latentgen.errors import InputError
from latentgen.models.memory import encoded
from latentgen.models.onnx.session import on_host, open_session
from latentgen.models.onnx.tokenizer import read_tokenizer
from latentgen.models.prompt import Laid, ReadsPrompts, Token, Window, sheet


@dataclass(frozen=True)
class OnnxText(ReadsPrompts):
    """A CLIP tokenizer and text tower: the ids are those of CLIPTokenizerFast, the states those of CLIPTextModel.

    shorter: the session of the tower without so many of its last layers; None where there is none.
    """

    tokenizer: Any
    session: Any
    window: Window
    shorter: Callable[[int], Any] | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        graph: Path,
        threads: int,
        second: bool = False,
        shorter: Callable[[str, int], Any] | None = None,
    ) -> Self:
        """A tokenizer and text encoder of a checkpoint, the first or the second. shorter: by its name, as above."""
        suffix = "_2" if second else ""
        folder, part = checkpoint.tokenizer(f"tokenizer{suffix}"), f"text_encoder{suffix}"
        alone = isinstance(checkpoint, SingleFile) and checkpoint.tower(part) == OPENCLIP
        tokenizer, window = read_tokenizer(folder, checkpoint.config(part), OPENCLIP_PAD if alone else None)
        session = open_session(checkpoint, part, graph, threads)
        return cls(tokenizer, session, window, None if shorter is None else cache(partial(shorter, part)))

    @property
    def skips(self) -> bool:
        """Whether layers can be left away."""
        return self.shorter is not None

    def tokens(self, text: str) -> list[Token]:
        """A text's tokens, without marks."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return [Token(id, *span) for id, span in zip(found.ids, found.offsets, strict=True)]

    def encode(
        self, prompts: Sequence[str], *, weights: bool = False, limit: int | None = 1, skip: int = 0
    ) -> Condition:
        """states (B, K·L, D), and pooled (B, P), as `models.text.TextEncoder.encode` gives them, float32 in NumPy."""
        if skip and self.shorter is None:
            raise InputError("clip_skip is for the text encoder as it is stored, and LoRAs are fused into this one")
        session = self.shorter(skip) if skip and self.shorter is not None else self.session
        laid = {prompt: self.lay(prompt, weights=weights, limit=limit) for prompt in dict.fromkeys(prompts)}
        chunks = sheet([laid[prompt] for prompt in prompts], self.window)
        states, *pooled = encoded(lambda ids: session.run(None, {"ids": ids}), chunks.ids)
        return Condition(states=chunks.states(states), pooled=chunks.pooled(pooled[0]) if pooled else None)

    def given(self, states: Any, pooled: Any = None) -> Condition:
        """Prompt embeddings somebody brought (an array (B, L, D)) as a condition."""
        if pooled is not None:
            raise InputError("pooled_prompt_embeds are for Stable Diffusion XL; these weights take prompt_embeds alone")
        return Condition(states=on_host(states))


@dataclass(frozen=True)
class TwoOnnxTexts:
    """Stable Diffusion XL's pair, as `models.text.TwoTextEncoders`: states side by side, pooled from the second."""

    first: OnnxText
    second: OnnxText
    zeros: bool = True

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        graphs: Mapping[str, Path],
        threads: int,
        shorter: Callable[[str, int], Any] | None = None,
    ) -> Self:
        """Both tokenizers and towers of a checkpoint."""
        one, other = (
            OnnxText.load(checkpoint, graphs[part], threads, part.endswith("_2"), shorter)
            for part in ("text_encoder", "text_encoder_2")
        )
        return cls(one, other, bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)))

    @property
    def length(self) -> int:
        """The context length L in tokens, the start and end marks included."""
        return min(self.first.length, self.second.length)

    def lay(self, prompt: str, *, weights: bool = False, limit: int | None = 1) -> Laid:
        """A prompt as the first tower's chunks; the second's are alike, but for padding."""
        return self.first.lay(prompt, weights=weights, limit=limit)

    @property
    def skips(self) -> bool:
        """Whether layers can be left away."""
        return self.first.skips

    def encode(
        self, prompts: Sequence[str], *, weights: bool = False, limit: int | None = 1, skip: int = 0
    ) -> Condition:
        """states (B, K·L, D1 + D2), pooled (B, P), which no skipping changes."""
        how: dict[str, Any] = {"weights": weights, "limit": limit, "skip": skip}
        one, other = (each.encode(prompts, **how) for each in (self.first, self.second))
        return Condition(states=np.concatenate([one.states, other.states], axis=-1), pooled=other.pooled)

    def empty(self, condition: Condition) -> Condition:
        """What stands for no negative prompt: all zeros of the condition's shapes, where the model wants that."""
        if not self.zeros or condition.states is None or condition.pooled is None:
            return condition
        return Condition(np.zeros_like(condition.states), np.zeros_like(condition.pooled))

    def given(self, states: Any, pooled: Any = None) -> Condition:
        """Prompt embeddings somebody brought, (B, L, D1 + D2), and pooled ones (B, P)."""
        if pooled is None:
            raise InputError("Stable Diffusion XL needs pooled_prompt_embeds beside prompt_embeds; give both")
        return Condition(on_host(states), on_host(pooled))

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, the start and end marks included."""
        return self.first.count(prompt)

    def cut(self, prompt: str) -> str:
        """The words of a prompt that lie beyond the context length."""
        return self.first.cut(prompt)
