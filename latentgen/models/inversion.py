"""New words by their embeddings alone (textual inversion, Gal et al. 2022): files, and a place in a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from latentgen.checkpoint import check_safetensors
from latentgen.errors import InputError
from latentgen.models.prompt import EMBEDDING, embedding_file
from latentgen.models.text import TextEncoder, TwoTextEncoders

PAIR = ("clip_l", "clip_g")  # what files for Stable Diffusion XL call the vectors of its two text encoders
Text = TextEncoder | TwoTextEncoders


class Embedding(NamedTuple):
    """A new word: vectors (n, D) for each text encoder, one or two, and the file they were read from."""

    word: str
    vectors: tuple[torch.Tensor, ...]
    file: Path


def read_embedding(path: str | Path, token: str | None = None) -> Embedding:
    """A new word, from a file or the folder it was saved into: diffusers' form, the web UI's, or XL's pair.

    Raises InputError, one line, for a pickle, a torn file, or one that holds no embedding.
    """
    from safetensors import safe_open

    file = embedding_file(path)
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file; embeddings in pickles are not loaded")
    if not file.is_file():
        raise InputError(f"no embedding at {file}; give a .safetensors file, or the folder that holds {EMBEDDING}")
    check_safetensors(file)
    with safe_open(file, "pt") as opened:
        held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        said = (opened.metadata() or {}).get("token")
    pair = sorted(held) == sorted(PAIR)
    if not pair and len(held) != 1:
        raise InputError(
            f"{file} holds {len(held)} tensors; an embedding of one word holds one, or {' and '.join(PAIR)}"
        )
    name = next(iter(held))
    vectors = tuple(
        v.float().reshape(-1, v.shape[-1]) for v in ((held[part] for part in PAIR) if pair else [held[name]])
    )
    if not all(bool(torch.isfinite(each).all()) for each in vectors):
        raise InputError(f"{file}: its vectors are not finite; its training diverged")
    word = token or said or (file.stem if pair or name == "emb_params" else name)
    return Embedding(word, vectors, file)


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
    """A new word while it is trained, in each text encoder."""
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
    from safetensors.torch import save_file

    if not all(bool(torch.isfinite(each).all()) for each in vectors):
        raise InputError(f"the vectors of {word!r} are not finite; the training diverged, nothing was written")
    held = [each.detach().float().cpu().contiguous() for each in vectors]
    named = {word: held[0]} if len(held) == 1 else dict(zip(PAIR, held, strict=True))
    save_file(named, folder / EMBEDDING, {"token": word})
    return folder / EMBEDDING
