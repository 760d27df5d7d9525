"""A CLIP tokenizer without transformers: from tokenizer.json, or from the vocab.json and merges.txt of older folders.

Words and marks are those of transformers' CLIPTokenizer, which is how diffusers reads the same folders.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from latentgen.checkpoint import read_json
from latentgen.errors import InputError
from latentgen.models.prompt import Window

END = "<|endoftext|>"
MARKS = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": END}  # CLIP's own
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_tokenizer(folder: Path, tower: Mapping[str, Any], pad: str | None = None) -> tuple[Any, Window]:
    """The tokenizer in a folder, and its window: how long a context is, and the ids of its marks.

    tower: the text encoder's config, which bounds the length. pad: the padding mark, instead of what the folder says.
    Raises InputError where the files are none of a CLIP tokenizer.
    """
    settings = _settings(folder) | ({} if pad is None else {"pad_token": pad})
    try:
        tokenizer = _from_files(folder, _content(settings["unk_token"]))
        _add_marks(tokenizer, settings, folder)
    except InputError:
        raise
    except Exception as error:  # the Rust reader raises bare Exceptions
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} cannot be read as a CLIP tokenizer: {line}") from error
    named = {mark: _content(settings[mark]) for mark in MARKS if mark != "unk_token"}
    ids = {mark: tokenizer.token_to_id(word) for mark, word in named.items()}
    if None in ids.values():
        missing = next(named[mark] for mark, id in ids.items() if id is None)
        raise InputError(f"{folder} is no CLIP tokenizer: it has no {missing}")
    if not (folder / "tokenizer.json").is_file():
        end, start = ((named[mark], ids[mark]) for mark in ("eos_token", "bos_token"))
        tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    positions = int(tower.get("max_position_embeddings", 77))
    length = min(int(settings.get("model_max_length") or positions), positions)
    return tokenizer, Window(length, ids["bos_token"], ids["eos_token"], ids["pad_token"])


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, over which special_tokens_map.json has the last word unless it lists its added tokens."""
    found = {}
    if (folder / "tokenizer_config.json").is_file():
        found = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in found and (folder / "special_tokens_map.json").is_file():
        found |= read_json(folder / "special_tokens_map.json")
    return MARKS | {key: value for key, value in found.items() if value}


def _content(mark: Any) -> str:
    return str(mark["content"] if isinstance(mark, dict) else mark)


def _from_files(folder: Path, unknown: str) -> Any:
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    files = (folder / name for name in ("vocab.json", "merges.txt"))
    model = BPE.from_file(*map(str, files), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_marks(tokenizer: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """What is a token of its own wherever it stands in a text: the added tokens, and the marks that are none of them.

    Where one mark is said twice, the later has the last word on how it is looked for, as in transformers.
    """
    listed = settings.get("added_tokens_decoder") or {}
    added = [_token(listed[id]) for id in sorted(listed, key=int)]
    marks = [settings[mark] for mark in MARKS]
    if not listed and (folder / "added_tokens.json").is_file():
        special = {_content(mark) for mark in marks}
        old = read_json(folder / "added_tokens.json")
        words = sorted(old, key=lambda word: int(old[word]))
        added = [AddedToken(word, normalized=word not in special, special=word in special) for word in words]
    known = {token.content for token in (*added, *tokenizer.get_added_tokens_decoder().values())}
    added += [
        _token(mark, special=True)
        for mark in marks
        if _content(mark) not in known and tokenizer.token_to_id(_content(mark)) is not None
    ]
    tokenizer.add_tokens(added)


def _token(said: Any, **options: Any) -> Any:
    if not isinstance(said, dict):
        return AddedToken(str(said), **options)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(said["content"], **({flag: said[flag] for flag in flags if flag in said} | options))
