"""The ONNX engine's tokenizer gives transformers' ids, whichever files a folder has; the picture is the same."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentgen import InputError, Pipeline
from latentgen.checkpoint import default_weights
from latentgen.models.onnx.tokenizer import read_tokenizer
from latentgen.models.text import TextEncoder

TEXTS = [
    "",
    "a red apple",
    "Ünïcode Cafe\u0301 café ﬁ İstanbul ẞ ÀÉÎ",
    "it's we're THEY'VE i'm you'll he'd don't 'tis",
    "3 cats, 2024 and 1/2; ½ ² ٣",
    "wow!!! (really?!) — “quoted” … #tag @name a_b",
    "tabs\tand\nlines \u00a0\u2003 and   spaces ",
    "😀 👩‍👩‍👧 🇩🇪 猫と犬 مرحبا",
    "<|endoftext|> a <|startoftext|>b <|EndOfText|>!",
    "\x00\u200b",
    "the quick brown fox " * 40,
    "supercalifragilisticexpialidocious" * 9,
]
MARK = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
START, END = ({"content": word, **MARK} for word in ("<|startoftext|>", "<|endoftext|>"))
TYPED = {"__type": "AddedToken"}
CONFIG = {"bos_token": START | TYPED, "eos_token": END | TYPED, "unk_token": END | TYPED, "model_max_length": 77}
MAP = {"bos_token": START, "eos_token": END, "unk_token": END}


def listed(vocab: dict[str, int], *words: str) -> dict[str, Any]:
    """added_tokens_decoder as transformers wrote it from 4.34 on."""
    return {str(vocab[word]): {"content": word, **MARK, "special": True} for word in words}


FORMS: dict[str, Any] = {  # name -> (tokenizer_config.json, special_tokens_map.json) of a vocabulary
    "vocabulary alone": lambda vocab: (None, None),
    "SD 1": lambda vocab: (CONFIG | {"pad_token": "<|endoftext|>"}, MAP | {"pad_token": "<|endoftext|>"}),
    "SD 2": lambda vocab: (CONFIG | {"pad_token": "<|endoftext|>"}, MAP | {"pad_token": "!"}),
    "XL's second": lambda vocab: (
        {
            "added_tokens_decoder": listed(vocab, "!", "<|startoftext|>", "<|endoftext|>"),
            **{"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!", "model_max_length": 77},
        },
        MAP | {"pad_token": "<|endoftext|>"},
    ),
    "names alone": lambda vocab: ({"pad_token": "!", "bos_token": "<|startoftext|>"}, None),
}


def write(folder: Path, form: str) -> Path:
    """A folder of the embedded weights' vocabulary in one of the forms."""
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(default_weights() / "tokenizer" / name, folder)
    said = FORMS[form](json.loads((folder / "vocab.json").read_text()))
    for name, value in zip(("tokenizer_config.json", "special_tokens_map.json"), said, strict=True):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def same(ours: Any, theirs: Any, text: str) -> None:
    for special in (False, True):
        found = ours.encode(text, add_special_tokens=special)
        expected = theirs(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        assert found.ids == expected["input_ids"], text
        assert found.offsets == expected["offset_mapping"], text


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_marks_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "words", form)
    ours, window = read_tokenizer(folder, {"max_position_embeddings": 77})
    theirs = CLIPTokenizer.from_pretrained(folder)
    for text in TEXTS:
        same(ours, theirs, text)
    marks = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (window.length, window.start, window.end, window.pad) == (77, *marks)


@pytest.mark.parametrize("form", ["SD 1", "SD 2"])
def test_a_padding_mark_that_is_given_is_read_as_transformers_reads_it(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "words", form)
    for tokenizer_json in (False, True):
        if tokenizer_json:
            CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
        theirs = CLIPTokenizer.from_pretrained(folder, pad_token="!")
        ours, window = read_tokenizer(folder, {}, "!")
        assert window.pad == theirs.pad_token_id == 0
        for text in TEXTS:
            same(ours, theirs, text)


@pytest.mark.parametrize("said", [None, 20, 77, int(1e30)])
@pytest.mark.parametrize("positions", [16, 120])
def test_the_context_is_what_is_said_and_else_all_the_tower_has(
    positions: int, said: int | None, tmp_path: Path
) -> None:
    folder = write(tmp_path / "words", "vocabulary alone")
    (folder / "tokenizer_config.json").write_text(json.dumps({} if said is None else {"model_max_length": said}))
    _, window = read_tokenizer(folder, {"max_position_embeddings": positions})
    assert window.length == min(said or positions, positions)
    tower = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
    assert TextEncoder(CLIPTokenizer.from_pretrained(folder), tower).window == window


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_has_the_ids_of_transformers(text: str, tokenizers: tuple[Any, Any]) -> None:
    same(*tokenizers, text)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write(tmp_path_factory.mktemp("any") / "words", "SD 1")
    return read_tokenizer(folder, {})[0], CLIPTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*exported once")
@pytest.mark.parametrize("family", ["folder", "two", "xl"])
def test_a_folder_without_tokenizer_json_gives_the_same_picture(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = request.getfixturevalue(family)
    stock = shutil.copytree(whole, tmp_path / "stock", ignore=shutil.ignore_patterns("tokenizer.json", "manifest.json"))
    call = {"negative_prompt": "rain!", "seed": 1, "num_inference_steps": 2, "output_type": "np"}
    ours = Pipeline.from_pretrained(stock, engine="onnx")
    for prompt in ("a Red  apple, it's 2!", "(café:1.2) 😀 BREAK noto"):
        expected = Pipeline.from_pretrained(stock, engine="torch")(prompt, **call).images
        np.testing.assert_allclose(ours(prompt, **call).images, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("vocab.json", "{", "cannot be read as a CLIP tokenizer: "),
        ("merges.txt", "a b c d", "cannot be read as a CLIP tokenizer: "),
        ("tokenizer_config.json", '{"pad_token": "[PAD]"}', r"is no CLIP tokenizer: it has no \[PAD\]"),
    ],
)
def test_files_that_are_no_tokenizer_get_one_line(tmp_path: Path, name: str, text: str, line: str) -> None:
    folder = write(tmp_path / "words", "vocabulary alone")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=line) as caught:
        read_tokenizer(folder, {})
    assert "\n" not in str(caught.value)
