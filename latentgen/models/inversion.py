"""New words by their embeddings alone (textual inversion, Gal et al. 2022): files, and a place in a text encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from latentgen.checkpoint import check_safetensors
from latentgen.checkpoint.tensors import save_tensors
from latentgen.errors import InputError
from latentgen.models.loading import one_at_a_time
from latentgen.models.lora.names import BUNDLED
from latentgen.models.prompt import EMBEDDING, embedding_file, escape
from latentgen.models.text import TextEncoder, TwoTextEncoders
from latentgen.values import shown

PAIR = ("clip_l", "clip_g")  # what files for Stable Diffusion XL call the vectors of its two text encoders
PAIRS = (PAIR, ("text_encoders_0", "text_encoders_1"))  # and what diffusers' scripts once called them
UNNAMED = ("emb_params", *(name for pair in PAIRS for name in pair))  # keys that are not the word; the web UI's first
_WEB_UI = re.compile(r"string_to_param\..*")  # what the web UI's pickles call the vectors
Text = TextEncoder | TwoTextEncoders


class Embedding(NamedTuple):
    """A new word: vectors (n, D) for each text encoder, one or two, and the file they were read from."""

    word: str
    vectors: tuple[torch.Tensor, ...]
    file: Path


def read_embedding(path: str | Path, token: str | None = None) -> Embedding:
    """A new word, from a file or the folder it was saved into: diffusers' form, the web UI's, or XL's pairs.

    token: what it is to be called, if not as the file says; of several words in a LoRA's file, which of them. Raises
    InputError, one line, for a pickle, a torn file, or one that holds no embedding.
    """
    from safetensors import safe_open

    file = _file(path)
    if token is not None and not isinstance(token, str):
        raise InputError(f"token is {shown(token)}; it must be a word, as <my-cat>")
    bundled, start = bundled_words(file), ""
    if bundled:
        if token not in bundled and len(bundled) > 1:
            raise InputError(f"{file} holds the words {', '.join(map(repr, bundled))}; name one of them as the token")
        start = f"{BUNDLED}{token if token in bundled else bundled[0]}."
    with safe_open(file, "pt") as opened:
        keys = [name for name in opened.keys() if name.startswith(start)]  # noqa: SIM118
        held = {_WEB_UI.sub("emb_params", name.removeprefix(start)): opened.get_tensor(name) for name in keys}
        said = bundled[0] if bundled else (opened.metadata() or {}).get("token")
    names = next((pair for pair in PAIRS if {*pair} == {*held}), tuple(held))
    if names not in PAIRS and len(names) != 1:
        pairs = ", or ".join(" and ".join(pair) for pair in PAIRS)
        raise InputError(f"{file} holds {len(held)} tensors; an embedding of one word holds one, or {pairs}")
    if flaw := next((name for name in names if not held[name].ndim or not held[name].numel()), None):
        raise InputError(f"{file}: {flaw} has shape {tuple(held[flaw].shape)}, which no vectors have; it is torn")
    vectors = tuple(held[name].float().reshape(-1, held[name].shape[-1]) for name in names)
    if not all(bool(torch.isfinite(each).all()) for each in vectors):
        raise InputError(f"{file}: its vectors are not finite; its training diverged")
    word = token or said or (file.stem if names[0] in UNNAMED else names[0])
    return Embedding(word, vectors, file)


def bundled_words(path: str | Path) -> list[str]:
    """The names of the new words that a LoRA's file holds beside it; none of an embedding's own file."""
    return list(dict.fromkeys(key.split(".")[1] for key in check_safetensors(_file(path)) if key.startswith(BUNDLED)))


def _file(path: str | Path) -> Path:
    file = embedding_file(path)
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file; embeddings in pickles are not loaded")
    if not file.is_file():
        raise InputError(f"no embedding at {file}; give a .safetensors file, or the folder that holds {EMBEDDING}")
    return file


def teach(text: Text, word: str, vectors: Sequence[torch.Tensor]) -> None:
    """Teach all the text encoders of some weights a word. vectors: (n, D) for each; all of them fit, or none is taught.

    Raises InputError for a word that is known, or vectors for other text encoders.
    """
    if len(vectors) != len(text.towers):
        raise InputError(
            f"the embedding of {word!r} is for {len(vectors)} text encoder(s), these weights have {len(text.towers)}; "
            "it is for another model"
        )
    for tower, own in zip(text.towers, vectors, strict=True):
        _check_fit(tower, word, own)
    for tower, own in zip(text.towers, vectors, strict=True):
        add_word(tower, word, own)


def check_sayable(word: str) -> None:
    """Raise InputError for a word that prompts cannot say as it is, since they read it as something else."""
    if escape(word) != word or word == "BREAK":
        other = re.sub(r"[\\()\[\]]+", "-", word).strip("-").lower() or "my-word"
        raise InputError(
            f"the new word is {word!r}, which prompts read otherwise: brackets weigh, and BREAK parts chunks; "
            f"give it another token, as {other!r}, or name its file so"
        )


def _check_fit(text: TextEncoder, word: str, vectors: torch.Tensor) -> None:
    table: nn.Embedding = text.model.get_input_embeddings()
    if vectors.shape[1] != table.weight.shape[1]:
        raise InputError(
            f"the embedding of {word!r} has {vectors.shape[1]} numbers a vector, this text encoder's words have "
            f"{table.weight.shape[1]}; it is for another model"
        )
    if not word.strip() or any(letter.isspace() for letter in word):
        raise InputError(f"the new word is {word!r}; it must be one word without spaces, as <my-cat>")
    known = text.tokenizer.get_vocab()
    taken = next((each for each in _names(word, len(vectors)) if each in known or f"{each}</w>" in known), None)
    if taken is not None:
        raise InputError(f"the text encoder has a word {taken!r} already; choose another, as <{taken.strip('<>')}-1>")


def _names(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{number}" for number in range(1, count))]


@one_at_a_time()
def add_word(text: TextEncoder, word: str, vectors: torch.Tensor) -> tuple[int, ...]:
    """Teach a text encoder a word: its token and, where it has several vectors, `word_1`, … as diffusers names them.

    vectors: (n, D). Returns the new tokens' ids. Raises InputError for a word that is known, or vectors of another
    width.
    """
    _check_fit(text, word, vectors)
    table, words = text.model.get_input_embeddings(), _names(word, len(vectors))
    text.tokenizer.add_tokens(words)
    ids = tuple(int(text.tokenizer.convert_tokens_to_ids(each)) for each in words)
    grown = nn.Embedding(max(ids) + 1, table.weight.shape[1], device=table.weight.device, dtype=table.weight.dtype)
    with torch.no_grad():
        grown.weight[: len(table.weight)] = table.weight
        grown.weight[list(ids)] = vectors.to(table.weight)
    grown.requires_grad_(False)
    text.model.set_input_embeddings(grown)
    text.learned[ids[0]] = ids
    return ids


def new_words(text: Text, word: str, vectors: Sequence[torch.Tensor]) -> nn.ModuleList:
    """A new word while it is trained, in each text encoder. Raises InputError for one that prompts cannot say."""
    check_sayable(word)
    return nn.ModuleList(NewWord(tower, word, own) for tower, own in zip(text.towers, vectors, strict=True))


def vectors_of(words: nn.ModuleList) -> list[torch.Tensor]:
    """Of `new_words`, as they are now."""
    return [word.vectors for word in words if isinstance(word, NewWord)]


class NewWord(nn.Module):
    """The vectors of a new word while they are trained: they take the place of the table's rows at every look-up."""

    def __init__(self, text: TextEncoder, word: str, vectors: torch.Tensor) -> None:
        super().__init__()
        self.ids = add_word(text, word, vectors)
        self.vectors = nn.Parameter(vectors.clone().to(text.model.device))
        self.__dict__["text"] = text
        text.model.get_input_embeddings().register_forward_hook(self._put)

    def _put(self, _: nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        for number, row in zip(self.ids, self.vectors, strict=True):
            out = torch.where((given[0] == number)[..., None], row.to(out.dtype), out)
        return out

    def train(self, mode: bool = True) -> NewWord:
        """As torch's, for the text encoder too: in training mode it records gradients."""
        self.__dict__["text"].model.train(mode)
        return super().train(mode)


def start_vectors(text: TextEncoder, word: str | None, count: int, seed: int) -> torch.Tensor:
    """(count, D): the embeddings of a word's tokens, repeated; without a word, the mean of all and a little noise."""
    table = text.model.get_input_embeddings().weight.detach().float().cpu()
    if word:
        ids = [token.id for token in text.tokens(word)]
        if not ids:
            raise InputError(f"like is {word!r}, which holds no word; name what the new word resembles")
        return table[[ids[number % len(ids)] for number in range(count)]].clone()
    noise = torch.randn((count, table.shape[1]), generator=torch.Generator().manual_seed(seed))
    return table.mean(0) + table.std(0) * noise * 0.5


def write_embedding(folder: Path, word: str, vectors: Sequence[torch.Tensor]) -> Path:
    """The file that diffusers' `load_textual_inversion` reads: by the word, or XL's pair, with the word beside it."""
    if not all(bool(torch.isfinite(each).all()) for each in vectors):
        raise InputError(f"the vectors of {word!r} are not finite; the training diverged, nothing was written")
    held = [each.detach().float().cpu().contiguous() for each in vectors]
    named = {word: held[0]} if len(held) == 1 else dict(zip(PAIR, held, strict=True))
    save_tensors(named, folder / EMBEDDING, {"token": word})
    return folder / EMBEDDING
