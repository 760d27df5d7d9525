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
        Returns the word. Raises InputError, one line, for a file that is none, is for another model, or a word that
        is known already.
        """
        if not hasattr(self.text, "towers"):
            self._use_torch()
        from latentgen.models.inversion import read_embedding, teach

        if not hasattr(self.text, "towers"):
            raise InputError("new words are for the torch engine; open the weights with engine torch")
        word, vectors, file = read_embedding(path, token)
        teach(self.text, word, vectors)
        said = Path(path).as_posix() if known_as is None else known_as
        self.words.append({"word": word, "path": said, "sha256": sha256(file)})
        return word

    def _use_torch(self) -> None:
        raise NotImplementedError
