"""New words in a pipeline: what textual inversion learned, read and taught. No torch until a word is loaded."""

from pathlib import Path
from typing import Any

from latentgen.durable import sha256
from latentgen.errors import InputError


class TakesWords:
    """What a pipeline can do with new words. words: those it was taught, as pictures' settings say them."""

    text: Any
    words: list[dict[str, Any]]

    def load_textual_inversion(self, path: str | Path, token: str | None = None, *, known_as: str | None = None) -> str:
        """Teach the text encoders a word from its embeddings (Gal et al. 2022): a .safetensors file, or its folder.

        token: how it is written in prompts, if not as the file says. known_as: the path that pictures' settings say.
        Of the file of a LoRA that holds new words too it is all of those, or that which token names. Returns the word,
        the first of several. Raises InputError, one line, for a file that is none, is for another model, or a word that
        is known already, or that prompts cannot say, as one with brackets.
        """
        from latentgen.models.inversion import bundled_words, check_sayable, read_embedding, teach

        named: list[str | None] = [token] if token is not None else [*bundled_words(path)] or [None]
        found = [read_embedding(path, each) for each in named]
        for word, _, _ in found:
            if known_as is None:  # and no picture of old
                check_sayable(word)
        if not hasattr(self.text, "towers"):
            self._use_torch()
        if not hasattr(self.text, "towers"):
            raise InputError("new words are for the torch engine; open the weights with engine torch")
        said = Path(path).as_posix() if known_as is None else known_as
        for word, vectors, file in found:
            teach(self.text, word, vectors)
            self.words.append({"word": word, "path": said, "sha256": sha256(file)})
        return found[0].word

    def _use_torch(self) -> None:
        raise NotImplementedError
