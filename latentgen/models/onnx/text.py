"""A prompt becomes a condition without torch: `tokenizers` reads it, ONNX Runtime encodes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from latentgen.checkpoint import Checkpoint, read_json
from latentgen.diffusion.denoiser import Condition
from latentgen.errors import InputError
from latentgen.models.onnx.session import on_host, open_session
from latentgen.models.prompt import ReadsPrompts, Token, Window, sheet

MARKS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}  # CLIP's own


@dataclass(frozen=True)
class OnnxText(ReadsPrompts):
    """A CLIP tokenizer and text tower: the ids are those of CLIPTokenizerFast, the states those of CLIPTextModel."""

    tokenizer: Any
    session: Any
    window: Window

    @classmethod
    def load(cls, checkpoint: Checkpoint, graph: Path, threads: int) -> Self:
        """The tokenizer and text encoder of a weights folder."""
        folder = checkpoint.tokenizer()
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the Rust reader raises bare Exceptions
            line = str(error).splitlines()[0]
            raise InputError(f"{folder} cannot be read as a CLIP tokenizer: {line}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        window = read_window(folder, tokenizer, checkpoint.config("text_encoder"))
        return cls(tokenizer, open_session(checkpoint, "text_encoder", graph, threads), window)

    def tokens(self, text: str) -> list[Token]:
        """A text's tokens, without marks."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return [Token(id, *span) for id, span in zip(found.ids, found.offsets, strict=True)]

    def encode(self, prompts: Sequence[str], *, weights: bool = False, limit: int | None = 1) -> Condition:
        """states (B, K·L, D) as `models.text.TextEncoder.encode` gives them, float32 in NumPy."""
        laid = {prompt: self.lay(prompt, weights=weights, limit=limit) for prompt in dict.fromkeys(prompts)}
        chunks = sheet([laid[prompt] for prompt in prompts], self.window)
        (states,) = self.session.run(None, {"ids": chunks.ids})
        return Condition(states=chunks.states(states))

    def given(self, states: Any, pooled: Any = None) -> Condition:
        """Prompt embeddings somebody brought (an array (B, L, D)) as a condition."""
        if pooled is not None:
            raise InputError("pooled_prompt_embeds are for Stable Diffusion XL; these weights take prompt_embeds alone")
        return Condition(states=on_host(states))


def read_window(folder: Path, tokenizer: Any, tower: Mapping[str, Any]) -> Window:
    """The context's length and marks, from tokenizer_config.json and (older) special_tokens_map.json."""
    named = dict(MARKS)
    settings = [read_json(folder / name) for name in FILES if (folder / name).is_file()]
    for found in settings:
        for mark in MARKS:
            value = found.get(mark)
            named[mark] = str((value.get("content") if isinstance(value, dict) else value) or named[mark])
    ids = {mark: tokenizer.token_to_id(word) for mark, word in named.items()}
    if None in ids.values():
        missing = next(named[mark] for mark, id in ids.items() if id is None)
        raise InputError(f"{folder} is no CLIP tokenizer: it has no {missing}")
    limits = [found["model_max_length"] for found in settings if found.get("model_max_length")]
    length = min(int(limits[-1] if limits else 77), int(tower.get("max_position_embeddings", 77)))
    return Window(length, ids["bos_token"], ids["eos_token"], ids["pad_token"])


FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the later has the last word
