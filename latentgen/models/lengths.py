"""Prompts of many lengths in one walk: padded to the longest, and shown to a network at their own length.

Prompts whose numbers of chunks have a small common multiple are repeated to it (`prompt.sheet`). Others, of 5 and 6
chunks, say, get padding, and with it the condition's mask (B, L), on the host, which is 1 where there is no padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from latentgen.diffusion.array import Array, namespace
from latentgen.diffusion.denoiser import Condition
from latentgen.errors import InputError
from latentgen.models import prompt

Rows = slice | np.ndarray  # which rows of a batch


def encoded_apart(
    encode: Callable[[Sequence[str]], Condition], prompts: Sequence[str], counts: Sequence[int], own: bool = False
) -> Condition:
    """The condition of prompts of so many chunks each; where they fit no common length, padded, with a mask.

    own: each stays as long as it is, so that what is drawn for its tokens (CADS) is what is drawn for it alone.
    """
    if len(set(counts)) == 1 or (prompt.fit_together(counts) and not own):
        return encode(prompts)
    rows = {count: [row for row, own in enumerate(counts) if own == count] for count in sorted(set(counts))}
    parts = [encode([prompts[row] for row in own]) for own in rows.values()]
    longest = max(int(part.states.shape[1]) for part in parts if part.states is not None)
    padded = [_padded(part, longest) for part in parts]
    return padded[0].join(*padded[1:]).rows(np.argsort(np.concatenate(list(rows.values()))))


def of_one_length(one: Condition, other: Condition, own: bool = False) -> tuple[Condition, Condition]:
    """Two conditions whose states have one length: repeated, which attention does not notice, or padded.

    Padded where repeated they would be more than four times the longer one, as of 7 and 5 chunks, which would be 35.
    own: the first is not repeated, as for `encoded_apart`.
    """
    if one.states is None or other.states is None:
        return one, other
    lengths = [int(one.states.shape[1]), int(other.states.shape[1])]
    masked, longer = one.mask is not None or other.mask is not None, own and lengths[0] % lengths[1] != 0
    if masked or longer or not prompt.fit_together(lengths):
        return _padded(one, max(lengths)), _padded(other, max(lengths))
    if lengths[0] == lengths[1]:
        return one, other
    states, others = prompt.alike(one.states, other.states)
    return replace(one, states=states), replace(other, states=others)


def groups(condition: Condition, count: int, rows: int) -> Iterator[tuple[Rows, Condition]]:
    """Which of `count` rows are shown to a network together, `rows` at most, all of one length, and their condition."""
    if condition.mask is None:
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            yield part, condition.rows(part)
        return
    lengths = np.asarray(condition.mask).sum(axis=1)
    for length in np.unique(lengths):
        own = np.flatnonzero(lengths == length)
        for first in range(0, len(own), rows):
            shown = condition.rows(own[first : first + rows])
            assert shown.states is not None
            yield own[first : first + rows], replace(shown, states=shown.states[:, : int(length)], mask=None)


def parts_of(values: Array, places: Sequence[Rows]) -> list[Array]:
    """The rows (B,) of each group, each a stretch of one array (B,): no copy of its own."""
    stretches = [place for place in places if isinstance(place, slice)]
    apart = [place for place in places if isinstance(place, np.ndarray)]
    if apart:
        ends = np.cumsum([len(place) for place in apart]).tolist()
        stretches = [slice(first, last) for first, last in pairwise((0, *ends))]
        values = values[np.concatenate(apart)]
    return [values[stretch] for stretch in stretches]


def in_order(outs: Sequence[Array], places: Sequence[Rows]) -> Array:
    """What a network gave for each group, as one batch again."""
    joined = namespace(outs[0]).concat(tuple(outs), axis=0)
    indices = [place for place in places if isinstance(place, np.ndarray)]
    return joined[np.argsort(np.concatenate(indices))] if indices else joined


def _padded(condition: Condition, length: int) -> Condition:
    """States (B, L, D) with zeros up to a length, and the mask that says so."""
    states = condition.states
    assert states is not None
    rows, own, width = states.shape
    mask = np.ones((rows, own), dtype=np.int64) if condition.mask is None else condition.mask
    if own < length:
        xp = namespace(states)
        zeros = xp.zeros((rows, length - own, width), dtype=states.dtype, device=states.device)
        states = xp.concat((states, zeros), axis=1)
        mask = np.pad(mask, ((0, 0), (0, length - own)))
    return replace(condition, states=states, mask=mask)


def check_embeds(name: str, prompts: int, width: int | None, states: Any, pooled: Any) -> None:
    """Raises InputError for embeddings (P, L, D), or pooled (P, D), that are not of P = `prompts`, or one for all.

    name: the argument's. width: D, where the U-Net says it. states, pooled: None is what was not brought.
    """
    counts = " or ".join(str(count) for count in sorted({1, prompts}))
    if states is not None and (
        len(states.shape) != 3
        or len(states) not in (1, prompts)
        or not states.shape[1]
        or (width and states.shape[2] != width)
    ):
        shape = f"{tuple(states.shape)}; it must be (prompts, tokens, {width or 'width'}), prompts being {counts}"
        raise InputError(f"{name} has shape {shape}")
    if pooled is not None and (len(pooled.shape) != 2 or len(pooled) not in (1, prompts)):
        shape = f"{tuple(pooled.shape)}; it must be ({counts}, width)"
        raise InputError(f"{name.replace('prompt', 'pooled_prompt')} has shape {shape}")
