"""Files of a new word, in each form that people have them in, are read as the vectors of each text encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentgen import InputError, Pipeline
from latentgen.models.inversion import new_words, read_embedding
from latentgen.models.text import TwoTextEncoders

ONE, OTHER = torch.arange(32.0).reshape(2, 16) / 32, torch.arange(40.0).reshape(2, 20) / 40  # of XL's two widths


@pytest.mark.parametrize(("first", "second"), [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_word_of_xl_is_taught_to_both_text_encoders(first: str, second: str, xl: Path, tmp_path: Path) -> None:
    save_file({second: OTHER, first: ONE}, tmp_path / "<mine>.safetensors")
    pipe = Pipeline.from_pretrained(xl, engine="torch")
    assert pipe.load_textual_inversion(tmp_path / "<mine>.safetensors") == "<mine>"
    assert isinstance(pipe.text, TwoTextEncoders)
    for tower, vectors in zip(pipe.text.towers, (ONE, OTHER), strict=True):
        ids = tower.tokenizer.convert_tokens_to_ids(["<mine>", "<mine>_1"])
        assert torch.equal(tower.model.get_input_embeddings().weight[ids], vectors)


@pytest.mark.parametrize(
    ("key", "word"),
    [("<cat>", "<cat>"), ("emb_params", "file"), ("clip_l", "file"), ("text_encoders_0", "file")],
)
def test_a_word_is_called_as_its_tensor_or_where_that_is_no_word_as_its_file(
    key: str, word: str, tmp_path: Path
) -> None:
    save_file({key: ONE}, tmp_path / "file.safetensors")
    found = read_embedding(tmp_path / "file.safetensors")
    assert found.word == word and torch.equal(found.vectors[0], ONE) and len(found.vectors) == 1
    assert read_embedding(tmp_path / "file.safetensors", "<dog>").word == "<dog>"
    save_file({key: ONE}, tmp_path / "file.safetensors", {"token": "<said>"})
    assert read_embedding(tmp_path / "file.safetensors").word == "<said>"


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"clip_l": ONE, "text_encoders_1": OTHER}, "2 tensors; .* clip_l and clip_g, or text_encoders_0 and text_enc"),
        ({"clip_l": ONE, "clip_g": OTHER, "t5": ONE.clone()}, "holds 3 tensors"),
        ({"<cat>": torch.tensor(1.0)}, r"<cat> has shape \(\), which no vectors have"),
        ({"clip_l": ONE, "clip_g": OTHER[:0]}, r"clip_g has shape \(0, 20\), which no vectors have"),
        ({"<cat>": ONE / 0}, "its vectors are not finite"),
    ],
)
def test_what_is_no_embedding_is_one_line(held: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    save_file(held, tmp_path / "file.safetensors")
    with pytest.raises(InputError, match=said) as refused:
        read_embedding(tmp_path / "file.safetensors")
    assert "\n" not in str(refused.value)


def test_a_word_that_prompts_read_otherwise_is_refused_but_for_pictures_of_old(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "Neg(v2).safetensors"
    save_file({"emb_params": ONE}, file)
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    for token in (None, "a\\b", "<cat[1]>", "BREAK"):
        with pytest.raises(InputError, match=r"which prompts read otherwise: .* give it another token, as '[a-z<>-]+"):
            pipe.load_textual_inversion(file, token)
    with pytest.raises(InputError, match="as 'neg-v2', or name its file so"):
        pipe.load_textual_inversion(file)
    with pytest.raises(InputError, match="prompts read otherwise"):
        new_words(pipe.text, "neg(v2)", [ONE])
    assert pipe.load_textual_inversion(file, "neg-v2") == "neg-v2"
    assert pipe.load_textual_inversion(file, "neg(v2)", known_as="neg(v2).safetensors") == "neg(v2)"
    (chunk,) = pipe.text.lay("a neg-v2", weights=True).chunks
    assert set(chunk.weights) == {1.0} and len(chunk.ids) == 3


def test_paths_and_words_of_another_kind_get_one_line(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    save_file({"<cat>": ONE}, tmp_path / "file.safetensors")
    wrong: list[Any] = [3, None, b"x", "a" * 5000]
    for path in wrong:
        with pytest.raises(InputError, match=r"^a new word's path is "):
            pipe.load_textual_inversion(path)
    tokens: list[tuple[Any, str]] = [(3, "3"), ([3] * 900, r"\[3, 3, [3, ]*…")]
    for token, said in tokens:
        with pytest.raises(InputError, match=f"^token is {said}; it must be a word"):
            pipe.load_textual_inversion(tmp_path / "file.safetensors", token)


def test_the_words_in_the_file_of_a_lora_are_all_taught_or_the_one_that_is_named(xl: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    held = {"bundle_emb.<one>.clip_l": ONE, "bundle_emb.<one>.clip_g": OTHER, "unet.conv_in.diff_b": torch.ones(16)}
    save_file(held, file)
    assert [read_embedding(file).word, read_embedding(file, "<mine>").word] == ["<one>", "<mine>"]
    save_file(held | {"bundle_emb.two.clip_l": ONE / 2, "bundle_emb.two.clip_g": OTHER / 2}, file)
    with pytest.raises(InputError, match="holds the words '<one>', 'two'; name one of them as the token"):
        read_embedding(file, "three")
    pipe = Pipeline.from_pretrained(xl, engine="torch")
    assert pipe.load_textual_inversion(file) == "<one>"
    assert [(word["word"], word["path"]) for word in pipe.words] == [("<one>", str(file)), ("two", str(file))]
    assert isinstance(pipe.text, TwoTextEncoders)
    for tower, vectors in zip(pipe.text.towers, (ONE, OTHER), strict=True):
        ids = tower.tokenizer.convert_tokens_to_ids(["<one>", "<one>_1", "two", "two_1"])
        assert torch.equal(tower.model.get_input_embeddings().weight[ids], torch.cat([vectors, vectors / 2]))
    again = Pipeline.from_pretrained(xl, engine="torch")
    assert again.load_textual_inversion(file, "two") == "two" and len(again.words) == 1
    save_file({"bundle_emb.old.string_to_param.*": ONE}, file)
    assert torch.equal(read_embedding(file).vectors[0], ONE)
