"""Prompts: the web UI's form is read, long ones go by chunks, and the states are those of each chunk encoded alone."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen import InputError, Pipeline
from latentgen.conditions import PromptText
from latentgen.image import read_settings
from latentgen.models.prompt import (
    Chunk,
    Piece,
    Sheet,
    Token,
    Window,
    alike,
    escape,
    lay,
    literal,
    parse,
    read_elsewhere,
    sheet,
    weighted,
)
from latentgen.models.text import TextEncoder
from latentgen.pipeline import PromptCut
from latentgen.render import Order, render, replay

WINDOW = Window(length=77, start=0, end=1, pad=1)
PLAIN = {"num_inference_steps": 2, "output_type": "np", "seed": 3}


def words(text: str) -> list[Token]:
    """A tokenizer of words and commas, one token each; its number is its length, a comma's is 99."""
    import re

    return [Token(99 if m[0] == "," else len(m[0]), *m.span()) for m in re.finditer(r"\w+|[^\w\s]", text)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the first block is what the web UI's own documentation and tests of its parser say
        ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
        ("a ((b)) c", [("a ", 1.0), ("b", 1.21), (" c", 1.0)]),
        ("a (b:3.12) c", [("a ", 1.0), ("b", 3.12), (" c", 1.0)]),
        ("a [b] c", [("a ", 1.0), ("b", 1 / 1.1), (" c", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a (", 1.0),  # there a bracket that is never closed weighs to the end; here it is text
                ("house", 1.43),
                (" ", 1.0),
                ("on", 1 / 1.1),
                (" a ", 1.0),
                ("hill", 0.5),
                (", sun, ", 1.0),
                ("sky", 1.331),
                (".", 1.0),
            ],
        ),
        ("(a (b:0.5) c)", [("a ", 1.1), ("b", 0.55), (" c", 1.1)]),
        ("(a: -1.5 )", [("a", -1.5)]),
        ("([a)]", [("a", 1.0)]),
        # what is not well formed stays text
        ("(a", [("(a", 1.0)]),
        ("a)", [("a)", 1.0)]),
        ("[a", [("[a", 1.0)]),
        ("a:1.3)", [("a:1.3)", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        (r"a\b \\ \[", [(r"a\b \ [", 1.0)]),
        ("ratio 1:2", [("ratio 1:2", 1.0)]),
        ("", []),
    ],
)
def test_the_form_of_the_web_ui_is_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    (section,) = parse(prompt)
    assert [piece.text for piece in section] == [text for text, _ in expected]
    assert [piece.weight for piece in section] == pytest.approx([weight for _, weight in expected])


def test_break_parts_sections_and_weights_reach_over_it() -> None:
    assert parse("a BREAK b") == ((Piece("a"),), (Piece("b"),))
    assert parse("(a BREAK\nb:1.5) c") == ((Piece("a", 1.5),), (Piece("b", 1.5), Piece(" c")))
    assert parse("BREAKFAST break") == ((Piece("BREAKFAST break"),),)
    assert literal("a BREAK (b)") == ((Piece("a BREAK (b)"),),)


TEXT = st.text(st.sampled_from(list("ab ,:.1\\()[]BREAK猫\n")), max_size=30)


@given(TEXT)
def test_whatever_is_written_is_read_and_no_character_is_made_up(prompt: str) -> None:
    text = "".join(piece.text for section in parse(prompt) for piece in section)
    rest = iter(prompt)
    assert all(character in rest for character in text)  # in its order, some brackets and weights left out


@given(TEXT.filter(lambda text: "BREAK" not in text))
def test_escaped_text_is_that_text(text: str) -> None:
    assert parse(escape(text)) == literal(text)


NUMBERS = st.decimals(-3, 3, places=2).map(str)


@given(st.lists(st.tuples(TEXT.map(lambda text: text.replace("BREAK", "")).filter(bool), NUMBERS), max_size=4), NUMBERS)
def test_nested_weights_multiply(parts: list[tuple[str, str]], outer: str) -> None:
    inside = "".join(f"({escape(text)}:{weight})" for text, weight in parts)
    (section,) = parse(f"(({inside}):{outer})")
    expected: list[Piece] = []
    for text, weight in parts:
        value = float(weight) * 1.1 * float(outer)
        if expected and expected[-1].weight == pytest.approx(value, abs=1e-12):
            text = expected.pop().text + text
        expected.append(Piece(text, value))
    assert "".join(piece.text for piece in section) == "".join(piece.text for piece in expected)
    weights = [piece.weight for piece in section for _ in piece.text]
    assert weights == pytest.approx([piece.weight for piece in expected for _ in piece.text])


def test_a_weight_that_no_state_could_bear_gets_one_line() -> None:
    with pytest.raises(InputError, match="weights go from -100 to 100"):
        parse("(" * 60 + "a" + ")" * 60)


def lengths(prompt: str, limit: int | None = None) -> list[int]:
    return [len(chunk.ids) for chunk in lay(parse(prompt), words, WINDOW, limit).chunks]


def test_chunks_end_at_a_comma_that_is_near_and_where_they_are_full_without_one() -> None:
    assert lengths("") == [0]
    assert lengths("w " * 75) == [75]
    assert lengths("w " * 76) == [75, 1]
    assert lengths("w " * 55 + ", " + "w " * 40) == [56, 40]  # the 20th place before the end: near
    assert lengths("w " * 54 + ", " + "w " * 40) == [75, 20]  # one before that: not
    assert lengths("w " * 74 + ", " + "w " * 3) == [75, 3]
    assert lengths("w " * 60 + ", w , " + "w " * 30) == [63, 30]  # the last comma
    assert lengths("w " * 60 + ", " + "w " * 14 + ", w") == [75, 2]  # a full chunk and then a comma, as in the web UI
    assert lengths("w BREAK w w BREAK BREAK w BREAK") == [1, 2, 1]


def test_a_word_that_begins_near_the_end_is_not_torn() -> None:
    def letters(text: str) -> list[Token]:
        return [Token(ord(c), k, k + 1) for k, c in enumerate(text) if not c.isspace()]

    laid = lay(literal("x " * 70 + "umbrella rain"), letters, WINDOW)
    assert [len(chunk.ids) for chunk in laid.chunks] == [70, 12]
    assert [len(chunk.ids) for chunk in lay(literal("x" * 100), letters, WINDOW).chunks] == [75, 25]


@pytest.mark.parametrize(
    ("before", "vectors", "lengths"),
    [("", 75, [75, 1]), ("w " * 72, 4, [72, 5]), ("w " * 10, 70, [10, 71]), ("w " * 10, 80, [10, 75, 6])],
)
def test_a_new_word_of_several_vectors_is_not_torn_unless_no_chunk_holds_it(
    before: str, vectors: int, lengths: list[int]
) -> None:
    def learned(text: str) -> list[Token]:
        return [token for one in words(text) for token in [one] * (vectors if text[one.start] == "N" else 1)]

    laid = lay(literal(f"{before}New w"), learned, WINDOW)
    assert [len(chunk.ids) for chunk in laid.chunks] == lengths


def test_what_a_limit_cuts_is_said_and_counted() -> None:
    text = ", ".join(f"word{k}" for k in range(60))  # 119 tokens
    laid = lay(literal(text), words, WINDOW, 1)
    assert [len(chunk.ids) for chunk in laid.chunks] == [75]  # to the end: with one chunk nothing is left for later
    assert laid.lost == text[text.index(", word38") :]
    assert (laid.used, laid.count) == (77, 121)
    assert lay(literal(text), words, WINDOW, 2).lost == ""
    laid = lay(parse("(a:1.3) b BREAK (c d:2) BREAK e"), words, WINDOW, 1)
    assert (laid.lost, laid.used, laid.count) == ("c d e", 4, 7)


@given(st.lists(st.sampled_from(["w", ",", "BREAK", "(long word:1.2)", "[x]"]), max_size=300))
@settings(max_examples=50)
def test_no_token_is_lost_and_none_is_doubled(parts: list[str]) -> None:
    prompt = " ".join(parts)
    laid = lay(parse(prompt), words, WINDOW)
    expected = [token.id for section in parse(prompt) for piece in section for token in words(piece.text)]
    assert [id for chunk in laid.chunks for id in chunk.ids] == expected
    assert all(0 < len(chunk.ids) <= 75 for chunk in laid.chunks) or not expected
    assert not laid.lost and laid.used == laid.count == len(expected) + 2 * len(laid.chunks)


def test_weights_multiply_states_and_the_mean_stays_as_in_the_web_ui() -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, 5, 8)).astype(np.float32) + 0.3
    weights = np.array([[1, 1.3, 0.5, 1, 1], [1, 1, 1, 1, 1], [1, 2, 2, 2, 1]], dtype=np.float32)
    got = weighted(states, weights)
    for row in (0, 2):
        z = states[row] * weights[row][:, None]
        np.testing.assert_allclose(got[row], z * (states[row].mean() / z.mean()), rtol=1e-5)
    np.testing.assert_array_equal(got[1], states[1])  # to the bit
    np.testing.assert_allclose(weighted(torch.from_numpy(states), weights).numpy(), got, rtol=1e-5)


def test_a_mean_of_nought_does_not_blow_states_up() -> None:
    states = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
    states -= states.mean(axis=2, keepdims=True)  # what a layer norm without a bias gives
    weights = np.array([[1, 1.3, 1.3, 1, 1]], dtype=np.float32)
    np.testing.assert_allclose(weighted(states, weights), states * weights[:, :, None], rtol=1e-6)
    means = np.array([1.3, -1.0, 0, 0.001, 0], np.float32)  # of a mean of 0.06 the weights leave 0.0002
    lopsided = np.tile(means[None, :, None], (1, 1, 8))
    assert np.abs(weighted(lopsided, np.array([[1, 1.3, 1.3, 1, 1]], np.float32))).max() <= 1.3 * 1.3 + 1e-6


def test_pooled_states_are_of_each_prompts_first_chunk() -> None:
    chunks = Sheet(np.zeros((3, 4), int), np.ones((3, 4), int), np.ones((3, 4), np.float32), np.array([[1, 0], [2, 1]]))
    np.testing.assert_array_equal(chunks.pooled(np.arange(6.0).reshape(3, 2)), [[2, 3], [4, 5]])


def test_repeated_states_are_one_attention() -> None:
    rng = np.random.default_rng(0)
    q, k2, k3 = (torch.from_numpy(rng.standard_normal((1, n, 8))) for n in (4, 2, 3))
    one, other = alike(k2, k3)
    assert one.shape == other.shape == (1, 6, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(q, one, one), attend(q, k2, k2))
    torch.testing.assert_close(attend(q, other, other), attend(q, k3, k3))


def test_prompts_of_many_lengths_that_fit_no_batch_get_one_line() -> None:
    laid = [lay(parse(" BREAK ".join(["a"] * count)), words, WINDOW) for count in (3, 4, 5)]
    with pytest.raises(InputError, match="prompts of 3, 4 and 5 chunks do not fit into one batch"):
        sheet(laid, WINDOW)
    assert sheet(laid[:2], WINDOW).rows.shape == (2, 12)


# With a real tokenizer of CLIP's form and a CLIPTextModel: a context of 16, so 14 tokens a chunk.


@pytest.fixture(scope="module")
def text(parts: dict[str, Any]) -> TextEncoder:
    return TextEncoder(parts["tokenizer"], parts["text_encoder"])


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, engine="torch")


def hand_encoded(text: TextEncoder, *parts: str) -> torch.Tensor:
    """Each part's states by transformers alone, side by side."""
    ids = text.tokenizer(list(parts), padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert ids.shape == (len(parts), 16)
    with torch.no_grad():
        return torch.cat(list(text.model(ids).last_hidden_state))


LONG = ("a red apple on a white table, a blue bird,", "the green frog and the yellow car")


@pytest.mark.parametrize(
    "prompt", ["a red apple", "", "A  Red\napple, (very) café 猫", "a smiling face with heart eyes"]
)
def test_a_plain_prompt_gives_the_tokens_and_states_of_transformers(text: TextEncoder, prompt: str) -> None:
    prompt = text.tokenizer.decode(text.tokenizer(prompt).input_ids[1:13])  # short enough
    tokens = text.tokenizer(prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    made = sheet([text.lay(prompt, weights=False, limit=None)], text.window)
    np.testing.assert_array_equal(made.ids, tokens.input_ids.numpy())
    np.testing.assert_array_equal(made.mask, tokens.attention_mask.numpy())
    with torch.no_grad():
        expected = text.model(tokens.input_ids)[0]
    states = text.encode([prompt], limit=None).states
    assert states is not None and torch.equal(states, expected)  # to the bit


def test_a_long_prompt_is_its_chunks_each_encoded_alone(text: TextEncoder) -> None:
    counts = [len(text.tokenizer(part).input_ids) for part in LONG]
    assert counts[0] <= 16 < sum(counts) - 2 and counts[1] <= 16, counts
    states = text.encode([" ".join(LONG), "a red apple"], limit=None).states
    assert states is not None and states.shape == (2, 32, 16)
    torch.testing.assert_close(states[0], hand_encoded(text, *LONG), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(states[1], hand_encoded(text, "a red apple", "a red apple"), atol=1e-6, rtol=1e-5)
    broken = text.encode(["a red apple BREAK a blue bird"], weights=True, limit=None).states
    assert broken is not None
    torch.testing.assert_close(broken[0], hand_encoded(text, "a red apple", "a blue bird"), atol=1e-6, rtol=1e-5)
    (first,) = text.lay(" ".join(LONG), limit=1).chunks
    cut = text.tokenizer(" ".join(LONG), max_length=16, truncation=True).input_ids
    assert [first.ids] == [tuple(cut[1:-1])]


def test_a_weighted_prompt_is_its_states_times_the_weights(parts: dict[str, Any]) -> None:
    from copy import deepcopy

    model = deepcopy(parts["text_encoder"])
    with torch.no_grad():
        model.final_layer_norm.bias += 0.4  # a trained tower's states have a mean
    text = TextEncoder(parts["tokenizer"], model)
    got = text.encode(["a (red apple:1.4), a [blue] bird"], weights=True, limit=None).states
    z = hand_encoded(text, "a red apple, a blue bird")
    tokens = [text.tokenizer(part, add_special_tokens=False).input_ids for part in ("a", "red apple", ", a", "blue")]
    each = [len(ids) for ids in tokens]
    weights = torch.ones(16)
    weights[1 + each[0] : 1 + sum(each[:2])] = 1.4
    weights[1 + sum(each[:3]) : 1 + sum(each)] = 1 / 1.1
    heavy = z * weights[:, None]
    assert got is not None
    torch.testing.assert_close(got[0], heavy * (z.mean() / heavy.mean()), atol=1e-5, rtol=1e-5)


def test_a_long_prompt_renders_alone_as_in_a_batch_and_from_its_states(pipe: Pipeline) -> None:
    text, long = pipe.text, " ".join(LONG)
    alone = pipe(long, negative_prompt="blue", **PLAIN).images[0]
    together = pipe(["a cat", long, "a BREAK b"], negative_prompt=["", "blue", ""], **(PLAIN | {"seed": 2}))
    np.testing.assert_allclose(together.images[1], alone, atol=1e-5)
    embeds = hand_encoded(text, *LONG)[None]
    negative = hand_encoded(text, "blue", "blue")[None]  # repeated, which attention does not notice
    given = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **PLAIN).images[0]
    np.testing.assert_allclose(given, alone, atol=1e-5)
    assert np.abs(alone - pipe(LONG[0], negative_prompt="blue", **PLAIN).images[0]).max() > 1e-3


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("counts", [(5, 6), (3, 4, 5)])
def test_prompts_whose_lengths_fit_no_batch_render_as_each_does_alone(
    folder: Path, engine: str, counts: tuple[int, ...]
) -> None:
    pipe = Pipeline.from_pretrained(folder, engine=engine)
    nouns = ("a red apple", "a blue bird", "rain", "the green frog", "a cat", "an orange umbrella")
    prompts = [" BREAK ".join(nouns[k % 6] for k in range(count, 2 * count)) for count in counts]
    for more in ({"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"negative_prompt": "a BREAK b", "batch": 2}):
        call = PLAIN | more
        together = pipe(prompts, **call).images
        for row, prompt in enumerate(prompts):
            alone = pipe(prompt, **(call | {"seed": PLAIN["seed"] + row})).images[0]
            np.testing.assert_allclose(together[row], alone, atol=1e-5)
    assert np.abs(together[0] - pipe(prompts[1], **PLAIN).images[0]).max() > 1e-3


@pytest.mark.parametrize(("counts", "negative"), [((1, 3), ""), ((5, 6), ""), ((1, 2), "a BREAK b BREAK c")])
@pytest.mark.parametrize("cache", [1, 2])
def test_annealed_prompts_of_many_lengths_render_as_each_does_alone(
    pipe: Pipeline, counts: tuple[int, int], negative: str, cache: int
) -> None:
    """The noise on a prompt is of its own tokens, however long the others are."""
    prompts = [" BREAK ".join(["a red apple", "rain", "a cat"][k % 3] for k in range(count)) for count in counts]
    call = {**PLAIN, "condition_annealing": (0.1, 0.9, 0.5), "negative_prompt": negative, "feature_cache": cache}
    together = pipe(prompts, **call).images
    for row, prompt in enumerate(prompts):
        own = pipe(prompt, **(call | {"seed": PLAIN["seed"] + row})).images[0]
        np.testing.assert_allclose(together[row], own, atol=1e-5)
    assert np.abs(together[0] - pipe(prompts[0], **PLAIN).images[0]).max() > 1e-3


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_negative_prompt_of_another_length_makes_no_text_longer_than_four_times_the_longest(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipeline.from_pretrained(folder, engine=engine)
    long, other = (" BREAK ".join(["a red apple"] * count) for count in (7, 5))
    shown: list[int] = []
    network = pipe.network
    monkeypatch.setattr(
        pipe, "network", lambda x, time, told: shown.append(told.states.shape[1]) or network(x, time, told)
    )
    apart = pipe(long, negative_prompt=other, **PLAIN).images[0]
    assert {length // pipe.text.length for length in shown} == {7, 5}  # and not 35
    together = pipe([long, "a cat"], negative_prompt=[other, "rain"], **PLAIN).images
    np.testing.assert_allclose(together[0], apart, atol=1e-5)
    shown.clear()
    pipe(long, negative_prompt="rain", **PLAIN)
    assert {length // pipe.text.length for length in shown} == {7}  # one evaluation of both


def test_xl_and_its_pooled_text_keep_their_rows_where_lengths_fit_no_batch(xl: Path) -> None:
    pipe = Pipeline.from_pretrained(xl, engine="torch")
    prompts = [" BREAK ".join(["a red apple", "rain", "a cat"] * 2), " BREAK ".join(["a blue bird"] * 5)]
    together = pipe(prompts, **PLAIN).images
    for row, prompt in enumerate(prompts):
        alone = pipe(prompt, **(PLAIN | {"seed": PLAIN["seed"] + row})).images[0]
        np.testing.assert_allclose(together[row], alone, atol=1e-5)


def test_weights_change_the_picture_and_the_switch_makes_brackets_text(pipe: Pipeline) -> None:
    def picture(prompt: str, **more: Any) -> np.ndarray:
        return pipe(prompt, **PLAIN, **more).images[0]

    plain, heavy = picture("a red apple"), picture("a (red:1.5) apple")
    assert np.abs(heavy - plain).max() > 1e-3
    np.testing.assert_array_equal(picture("a (red:1.0) apple"), plain)
    np.testing.assert_array_equal(picture("a (red) apple", prompt_weights=False), picture(r"a \(red\) apple"))
    negative = "a (red:1.5) b"
    assert np.abs(picture("x", negative_prompt=negative) - picture("x")).max() > 1e-3
    assert np.abs(picture("x", negative_prompt="(red:1.5) b") - picture("x", negative_prompt="red b")).max() > 1e-4


def test_nothing_is_cut_without_a_word(pipe: Pipeline) -> None:
    long = " ".join(["red"] * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptCut)
        pipe(long, **PLAIN)
    with pytest.warns(PromptCut, match=r"the prompt has \d+ tokens, of which 32 are used; not seen: '"):
        pipe(long, max_embeddings_multiples=2, **PLAIN)


@pytest.mark.parametrize(
    ("prompt", "lines"),
    [
        ("a <lora:my style:0.8> cat", ["<lora:my style:0.8> is read as text; give --lora FILE:0.8, or load_lora"]),
        ("a <lora:b>, (<lyco:c:-1:2>:1.1)", ["<lora:b> .* --lora FILE:1, or", "<lyco:c:-1:2> .* --lora FILE:-1, or"]),
        ("<hypernet:h:1> <my-cat>", ["<hypernet:h:1> is read as text; hypernetworks are not loaded"]),
        ("a cat AND a dog AND rain", ["AND is read as text; prompts are not composed"]),
        ("a SALT AND PEPPER sign BREAK a < b: c >", ["AND is read as text"]),
        ("SALT AND PEPPER", []),
        ("a dog and a cat, sAND, AND", []),
    ],
)
def test_what_the_web_ui_reads_as_more_than_text_is_said(prompt: str, lines: list[str], pipe: Pipeline) -> None:
    found = read_elsewhere(prompt)
    assert len(found) == len(lines) and all(map(re.match, lines, found))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe("x", negative_prompt=prompt, **PLAIN)
        said = [str(each.message) for each in caught if each.category is PromptText]
        pipe("x", negative_prompt=prompt, prompt_weights=False, **PLAIN)
    assert said == found == [str(each.message) for each in caught if each.category is PromptText]


def test_a_replay_reads_the_prompt_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    order = Order(["a (red:1.4) apple, " + LONG[1]], steps=2, seed=1, prompt_weights=False, max_embeddings_multiples=2)
    (path,) = render(order, tmp_path / "a.png", str(folder))
    said = read_settings(path)
    assert (said["prompt_weights"], said["max_embeddings_multiples"]) == (False, 2)
    _, remarks = replay(path, tmp_path / "b.png", str(folder))
    assert remarks == ["the same file, byte for byte"]


def test_chunks_are_plain_data() -> None:
    made = sheet([lay(parse("(a:1.5) bb"), words, Window(6, 7, 8, 9))], Window(6, 7, 8, 9))
    assert json.dumps(made.ids.tolist()) == "[[7, 1, 2, 8, 9, 9]]"
    assert made.mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert made.weights.tolist() == [[1, 1.5, 1, 1, 1, 1]]
    assert lay(parse(""), words, WINDOW).chunks == (Chunk(),)
    np.testing.assert_array_equal(made.pooled(np.arange(3.0).reshape(1, 3)), [[0, 1, 2]])
