"""New words by their embeddings alone (textual inversion, Gal et al. 2022): files, and a place in a text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentgen.checkpoint import check_safetensors
from latentgen.errors import InputError
from latentgen.models.prompt import EMBEDDING, embedding_file
from latentgen.models.text import TextEncoder


def read_embedding(path: str | Path, token: str | None = None) -> tuple[str, torch.Tensor, Path]:
    """A new word and its vectors (n, D), from a file or the folder it was saved into: diffusers' form or the web UI's.

    Raises InputError, one line, for a pickle, a torn file, or one that holds no embedding.
    """
    from safetensors.torch import load_file

    file = embedding_file(path)
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file; embeddings in pickles are not loaded")
    if not file.is_file():
        raise InputError(f"no embedding at {file}; give a .safetensors file, or the folder that holds {EMBEDDING}")
    check_safetensors(file)
    held = load_file(file)
    if len(held) != 1:
        raise InputError(f"{file} holds {len(held)} tensors; an embedding of one word holds one")
    ((name, vectors),) = held.items()
    vectors = vectors.float().reshape(-1, vectors.shape[-1])
    if not bool(torch.isfinite(vectors).all()):
        raise InputError(f"{file}: its vectors are not finite; its training diverged")
    word = token or (file.stem if name == "emb_params" else name)
    return word, vectors, file


def add_word(text: TextEncoder, word: str, vectors: torch.Tensor) -> tuple[int, ...]:
    """Teach a text encoder a word: its token and, where it has several vectors, `word_1`, … as diffusers names them.

    vectors: (n, D). Returns the new tokens' ids. Raises InputError for a word that is known, or vectors of another
    width.
    """
    table: nn.Embedding = text.model.get_input_embeddings()
    if vectors.shape[1] != table.weight.shape[1]:
        raise InputError(
            f"the embedding of {word!r} has {vectors.shape[1]} numbers a vector, this text encoder's words have "
            f"{table.weight.shape[1]}; it is for another model"
        )
    if not word.strip() or any(letter.isspace() for letter in word):
        raise InputError(f"the new word is {word!r}; it must be one word without spaces, as <my-cat>")
    words = [word, *(f"{word}_{number}" for number in range(1, len(vectors)))]
    known = text.tokenizer.get_vocab()
    taken = next((each for each in words if each in known or f"{each}</w>" in known), None)
    if taken is not None:
        raise InputError(f"the text encoder has a word {taken!r} already; choose another, as <{taken.strip('<>')}-1>")
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


def write_embedding(folder: Path, word: str, vectors: torch.Tensor) -> Path:
    """The file that diffusers' `load_textual_inversion` reads."""
    from safetensors.torch import save_file

    if not bool(torch.isfinite(vectors).all()):
        raise InputError(f"the vectors of {word!r} are not finite; the training diverged, nothing was written")
    save_file({word: vectors.detach().float().cpu().contiguous()}, folder / EMBEDDING)
    return folder / EMBEDDING
