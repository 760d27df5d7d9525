"""A request's prompts, or the embeddings brought instead of them, become the conditions of its pictures."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from latentgen.diffusion.denoiser import Condition, told_scale
from latentgen.errors import InputError
from latentgen.models.lengths import check_embeds, encoded_apart, of_one_length
from latentgen.models.prompt import read_elsewhere
from latentgen.request import Request

Given = tuple[Any, Any]  # states and pooled states that somebody brought, or None


class PromptCut(UserWarning):
    """A prompt is longer than what may be read of it: the message says which words are not seen."""


class PromptText(UserWarning):
    """What other programs read as more in a prompt is text here: the message says what, and what to do instead."""


def conditions_of(
    pipe: Any, request: Request, given: Given, given_negative: Given
) -> tuple[Condition, Condition | None]:
    """The condition (B, L, D) and, where guidance is on, the one to be guided away from.

    pipe: whose text encoder reads the prompts. given, given_negative: what was brought instead of them. Warns
    (PromptCut) of words that are cut, and (PromptText) of what is text here alone; raises InputError for embeddings
    that do not fit.
    """
    for text in dict.fromkeys((*request.prompts, *request.negatives)):
        _say_what_is_cut(pipe.text, text, request)
        for line in read_elsewhere(text) if request.prompt_weights else ():
            warnings.warn(line, PromptText, stacklevel=3)
    condition = _states(pipe, request, request.prompts, given, "prompt_embeds", request.clip_skip)
    if request.told:
        guided = np.tile(told_scale(request.guidance, request.told), (len(request), 1))
        condition = replace(condition, guided=pipe.latent.array(guided))
    if request.scale <= 1:
        return condition, None
    if given_negative[0] is not None and any(request.negatives):
        raise InputError("a negative prompt and negative_prompt_embeds were both given; give one of them")
    negative = _states(pipe, request, request.negatives, given_negative, "negative_prompt_embeds")
    if given_negative[0] is None and not request.said and hasattr(pipe.text, "empty"):
        empty = pipe.text.empty(negative)
        brought = empty.pooled if given_negative[1] is None else negative.pooled
        negative = replace(negative, states=empty.states, pooled=brought)
    return of_one_length(condition, negative, own=request.annealing is not None)


def _states(pipe: Any, request: Request, prompts: Sequence[str], given: Given, name: str, skip: int = 0) -> Condition:
    states, pooled = given
    width, count = pipe.terms.configs[0].get("cross_attention_dim"), len(request)
    check_embeds(name, count // request.each, width, states, pooled)
    states, pooled = (None if e is None else e[[k * len(e) // count for k in range(count)]] for e in given)
    if states is None:
        how: dict[str, Any] = {"weights": request.prompt_weights, "limit": request.max_embeddings_multiples}
        chunks = {text: len(pipe.text.lay(text, **how).chunks) for text in dict.fromkeys(prompts)}
        read = partial(pipe.text.encode, **how, skip=skip)
        own = name == "prompt_embeds" and request.annealing is not None  # whose tokens get noise of their own
        told = encoded_apart(read, prompts, [chunks[text] for text in prompts], own)
        told = told if pooled is None else pipe.text.given(told.states, pooled)
    else:
        told = pipe.text.given(states, pooled)
    if told.pooled is None:
        return told
    size = (request.height, request.width)
    sizes = np.tile(np.array([*size, 0, 0, *size], dtype=np.float32), (len(request), 1))
    return replace(told, sizes=pipe.latent.array(sizes))


def _say_what_is_cut(reader: Any, text: str, request: Request) -> None:
    laid = reader.lay(text, weights=request.prompt_weights, limit=request.max_embeddings_multiples)
    if laid.lost:
        counted = f"the prompt has {laid.count} tokens, of which {laid.used} are used"
        warnings.warn(f"{counted}; not seen: {laid.lost!r}", PromptCut, stacklevel=4)
