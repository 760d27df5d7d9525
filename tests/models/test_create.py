"""New networks: a tokenizer in CLIP's form that can write any text, towers that agree, sizes that are asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from latentgen import InputError
from latentgen.models import create

CAPTIONS = ["a red apple", "a red car, noto emoji", "the red apple and the blue car", "noto emoji of a cat"] * 3
CONTEXT = 16


@pytest.fixture(scope="module")
def words() -> Any:
    return create.tokenizer(CAPTIONS, 560, CONTEXT)


def test_ids_are_bytes_bytes_that_end_a_word_merges_start_and_end(words: Any) -> None:
    ids = words.get_vocab()
    by_id = [token for token, _ in sorted(ids.items(), key=lambda entry: entry[1])]
    letters = sorted(ByteLevel.alphabet())
    assert sorted(ids.values()) == list(range(len(ids)))
    assert by_id[:256] == letters and by_id[256:512] == [letter + "</w>" for letter in letters]
    assert by_id[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert 514 < len(words) <= 560 and len(by_id) == len(words)
    assert (words.bos_token_id, words.eos_token_id) == (len(ids) - 2, len(ids) - 1)
    assert words.pad_token_id == words.eos_token_id and words.model_max_length == CONTEXT


def test_words_of_the_captions_are_one_token(words: Any) -> None:
    start, end = words.bos_token_id, words.eos_token_id
    assert words("RED  apple").input_ids == [start, *words.convert_tokens_to_ids(["red</w>", "apple</w>"]), end]


MARKS = ("<|startoftext|>", "<|endoftext|>")


def told(text: str) -> str:
    """What a tokenizer of CLIP's form keeps of a text: its letters, without case and spaces."""
    import unicodedata

    for mark in MARKS:  # are no letters, and not said when marks are left out
        text = text.replace(mark, "")
    return "".join(unicodedata.normalize("NFC", text).lower().split())


@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_can_be_written_and_read_back(words: Any, text: str) -> None:
    ids = words(text).input_ids
    assert ids[0] == words.bos_token_id and ids[-1] == words.eos_token_id
    marked = any(mark in text for mark in MARKS)
    assert marked or words.eos_token_id not in ids[1:-1]  # nothing is unknown
    read = words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(read.split()) == told(text)


@pytest.mark.parametrize("text", ["Ünïcödé", "红苹果 🍎", "a  b\tc", "don't", "x" * 50, "\x00\u200d", ""])
def test_read_back_from_a_folder_it_says_the_same(words: Any, tmp_path: Path, text: str) -> None:
    words.save_pretrained(tmp_path)
    again = create.read_tokenizer(tmp_path)
    assert again.get_vocab() == words.get_vocab() and again.model_max_length == CONTEXT
    assert again(text).input_ids == words(text).input_ids
    padded = {"padding": "max_length", "truncation": True, "max_length": CONTEXT}
    assert again(text, **padded).input_ids == words(text, **padded).input_ids


def test_its_context_is_one_that_the_tower_beside_it_can_read(words: Any, tmp_path: Path) -> None:
    words.save_pretrained(tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 20}))
    for said, context in ((None, 20), (int(1e30), 20), (77, 20), (CONTEXT, CONTEXT)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": said}))
        assert create.read_tokenizer(tmp_path / "tokenizer").model_max_length == context


def test_one_set_of_captions_gives_one_tokenizer(words: Any) -> None:
    assert create.tokenizer(CAPTIONS, 560, CONTEXT).get_vocab() == words.get_vocab()


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="514 byte and end tokens"):
        create.tokenizer(CAPTIONS, 514, CONTEXT)


@pytest.fixture(scope="module")
def clip(words: Any) -> Any:
    torch.manual_seed(0)
    return create.clip(words, size=16, patch=8, width=16, heads=2, text_layers=2, image_layers=1).eval()


def test_the_text_tower_alone_says_what_clip_says(words: Any, clip: Any) -> None:
    ids = torch.tensor(words(["a red apple", "cat"], padding="max_length", max_length=CONTEXT).input_ids)
    tower = create.text_tower(clip)
    with torch.no_grad():
        ours, theirs = tower(input_ids=ids), clip.text_model(input_ids=ids)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output)
    first = next(tower.parameters())
    before = [weight.clone() for weight in clip.parameters()]
    with torch.no_grad():
        first.add_(1)  # a copy: CLIP's own weights stay
    assert all(torch.equal(weight, kept) for weight, kept in zip(clip.parameters(), before, strict=True))


@pytest.mark.parametrize("width", [32, 130, 192, 200])
def test_a_pooled_text_of_any_width_is_divided_among_heads(width: int) -> None:
    unet = create.unet(
        channels=(32,), layers=1, head_width=32, latent_channels=4, latent_size=8, text_width=width, pooled=True
    )
    drawn = unet(torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 5, width)).sample
    assert drawn.shape == (1, 4, 8, 8)
    if width == 192:
        assert unet.config.addition_embed_type_num_heads == 3  # 64 numbers each


def test_the_pooled_text_is_read_at_its_first_end_mark(words: Any, clip: Any) -> None:
    short = torch.tensor(words(["cat"]).input_ids)
    padded = torch.tensor(words(["cat"], padding="max_length", max_length=CONTEXT).input_ids)
    with torch.no_grad():
        one, other = (clip.text_model(input_ids=ids).pooler_output for ids in (short, padded))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("channels", "factor"), [([8], 1), ([8, 8], 2), ([8, 8, 8, 16], 8)])
def test_each_level_of_the_vae_halves_the_side(channels: list[int], factor: int) -> None:
    vae = create.autoencoder(channels=channels, latent_channels=3, layers=1, groups=4, size=16)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 16, 24)).latent_dist.mean
        assert latents.shape == (1, 3, 16 // factor, 24 // factor)
        assert vae.decode(latents).sample.shape == (1, 3, 16, 24)


def test_the_unet_has_heads_of_the_width_asked_for() -> None:
    unet = create.unet(channels=[32, 64], layers=1, head_width=16, latent_channels=3, latent_size=4, text_width=16)
    heads = [(block.attentions[0].transformer_blocks[0].attn1.heads) for block in unet.down_blocks]
    assert heads == [2, 4]
    with torch.no_grad():
        out = unet(torch.zeros(2, 3, 4, 4), torch.tensor([3.0, 9.5]), torch.zeros(2, 5, 16)).sample
    assert out.shape == (2, 3, 4, 4)


def test_dropout_acts_while_the_unet_trains_and_leaves_what_it_draws_alone() -> None:
    form: dict[str, Any] = {"channels": (32, 64), "head_width": 16, "layers": 1, "latent_channels": 4}
    form |= {"latent_size": 8, "text_width": 16}
    dropping, plain = create.unet(**form, dropout=0.5), create.unet(**form)
    plain.load_state_dict(dropping.state_dict())
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def drawn(network: Any) -> torch.Tensor:
        out: torch.Tensor = network(x, torch.tensor([10.0, 500.0]), encoder_hidden_states=states).sample
        return out

    with torch.no_grad():
        assert not torch.allclose(drawn(dropping.train()), drawn(dropping))
        assert torch.equal(drawn(dropping.eval()), drawn(plain.eval()))
