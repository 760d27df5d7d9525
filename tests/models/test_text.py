"""The text encoder gives what transformers gives, each distinct prompt once, and says which words are lost."""

from typing import Any

import numpy as np
import pytest
import torch

from latentgen.models.text import TextEncoder


@pytest.fixture(scope="module")
def text(parts: dict[str, Any]) -> TextEncoder:
    return TextEncoder(parts["tokenizer"], parts["text_encoder"])


def test_states_are_the_last_hidden_states_of_the_padded_prompt(text: TextEncoder) -> None:
    condition = text.encode(["a red apple", "", "a red apple"])
    assert condition.states is not None and tuple(condition.states.shape) == (3, 16, 16)
    tokens = text.tokenizer("a red apple", padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = text.model(tokens).last_hidden_state[0]
    torch.testing.assert_close(condition.states[0], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(condition.states[0], condition.states[2])
    assert not condition.states.requires_grad


def test_states_that_are_brought_become_float32_on_the_encoders_device(text: TextEncoder) -> None:
    condition = text.given(np.ones((2, 5, 16), dtype=np.float64))
    assert condition.states is not None and condition.states.dtype == torch.float32 and len(condition) == 2


@pytest.mark.parametrize("filler", ["red ", "red, ", "Red\n"])
def test_the_words_that_are_cut_are_the_words_that_do_not_fit(text: TextEncoder, filler: str) -> None:
    assert text.cut("a red apple") == ""
    for repeats in range(4, 20):
        prompt = filler * repeats + "umbrella"
        lost = text.cut(prompt)
        assert bool(lost) == (text.count(prompt) > text.length)
        if lost:
            assert prompt.rstrip().endswith(lost)
            kept = prompt.rstrip()[: -len(lost)]
            assert text.count(kept) <= text.length
