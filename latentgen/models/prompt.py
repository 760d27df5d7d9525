"""Prompts of any length, with weights: text -> pieces -> chunks of tokens -> states. No torch: both engines use it.

The form is the one that the AUTOMATIC1111 web UI made common: `(word)` weighs 1.1, `((word))` 1.21, `(word:1.3)` 1.3,
`[word]` 1/1.1; a backslash before a bracket or a backslash makes it a plain character; `BREAK` begins a new chunk.
What is not well formed stays text. A chunk is what a text encoder sees at once: a start mark, tokens, an end mark,
padding. The states of a prompt's chunks stand side by side along the token axis, and cross-attention reads them all.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentgen.diffusion.array import Array, like, namespace
from latentgen.errors import InputError
from latentgen.values import as_path

STEP = 1.1  # what one pair of brackets weighs
LARGEST = 100.0  # beyond it states are numbers, but no prompt means it
REPEATS = 4  # how many times the chunks of the longest prompt of a batch may be repeated, so that all fit

EMBEDDING = "learned_embeds.safetensors"  # what diffusers calls the file of a new word

_PARTS = re.compile(
    r"(?P<escape>\\[\\()\[\]])"
    r"|(?P<weight>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\))"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_ELSEWHERE = re.compile(r"<(?P<kind>lora|lyco|hypernet):[^<>:]+(?::(?P<weight>[^<>:]*))?[^<>]*>|(?<=\s)AND(?=\s)")


class Piece(NamedTuple):
    """A run of text that weighs the same."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]  # what stands between two BREAKs


class Token(NamedTuple):
    """A token's number, and which characters of the text it stands for."""

    id: int
    start: int
    end: int


Tokenize = Callable[[str], Sequence[Token]]  # a text's tokens without any marks


@dataclass(frozen=True)
class Window:
    """What a text encoder sees at once: `length` tokens, the start and end marks included; the rest is `pad`."""

    length: int
    start: int
    end: int
    pad: int

    @property
    def room(self) -> int:
        """Tokens beside the two marks."""
        return self.length - 2

    @property
    def near(self) -> int:
        """How far before a full chunk's end a comma is near: 20 of 75 tokens, as in the web UI, in proportion."""
        return 20 * self.room // 75


@dataclass(frozen=True)
class Chunk:
    """Tokens of one chunk, marks and padding not included, with their weights."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Laid:
    """A prompt as chunks. lost: its words beyond the last allowed chunk, "" where all fits.

    used, count: tokens in the chunks and tokens in all, each chunk's two marks included.
    """

    chunks: tuple[Chunk, ...]
    lost: str
    used: int
    count: int


def embedding_file(path: str | Path) -> Path:
    """The file of a new word's embeddings: as named, or in the folder it was saved into."""
    path = as_path("a new word's path", path).expanduser()
    return path / EMBEDDING if path.is_dir() else path


def parse(prompt: str) -> tuple[Section, ...]:
    """The sections of a prompt, each of pieces with weights; adjacent pieces of one weight are one piece.

    Raises InputError for a weight beyond ±100.
    """
    runs: list[_Run] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for part in _PARTS.finditer(prompt):
        text, number = part.group(), part.group("number")
        if part.group("escape"):
            runs.append(_Run(text[1], plain=True))
        elif number is not None and opened["("]:
            _weigh(runs, opened["("].pop(), float(number))
        elif text in opened:
            opened[text].append(len(runs))
            runs.append(_Run(text, plain=True))
        elif text == ")" and opened["("]:
            _weigh(runs, opened["("].pop(), STEP)
        elif text == "]" and opened["["]:
            _weigh(runs, opened["["].pop(), 1 / STEP)
        else:
            runs.append(_Run(text))
    sections: list[list[Piece]] = [[]]
    for run in runs:
        if run.text and not abs(run.weight) <= LARGEST:
            raise InputError(f"the prompt weighs {run.text[:40]!r} by {run.weight:g}; weights go from -100 to 100")
        for number, text in enumerate([run.text] if run.plain else _BREAK.split(run.text)):
            if number:
                sections.append([])
            _append(sections[-1], text, run.weight)
    return tuple(tuple(section) for section in sections)


def read_elsewhere(prompt: str) -> list[str]:
    """A line of each thing in a prompt that the web UI reads as more than text, and this form does not."""
    lines = []
    for found in _ELSEWHERE.finditer(prompt):
        if found["kind"] in ("lora", "lyco"):
            lines.append(f"{found[0]} is read as text; give --lora FILE:{found['weight'] or 1}, or load_lora")
        elif found["kind"]:
            lines.append(f"{found[0]} is read as text; hypernetworks are not loaded")
        elif not prompt.isupper():
            lines.append("AND is read as text; prompts are not composed")
    return list(dict.fromkeys(lines))


def literal(prompt: str) -> tuple[Section, ...]:
    """A prompt that is all text, as `parse` would give it."""
    return ((Piece(prompt),),) if prompt else ((),)


def escape(text: str) -> str:
    """Text as a prompt that means that text: `parse` gives it back, but for a word BREAK, which has no escape."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def lay(sections: Sequence[Section], tokenize: Tokenize, window: Window, limit: int | None = None) -> Laid:
    """A prompt's sections as chunks, `limit` at most; every section begins a chunk of its own.

    A chunk that is full ends after its last comma if that is near its end (`Window.near`), as in the web UI; else
    before a word that would be torn, if the word begins near the end; else where it is full. A new word of several
    vectors is never torn, unless no chunk holds it. The last allowed chunk is filled to the end.
    """
    text, streams = "", []
    for section in sections:
        stream: list[tuple[Token, float]] = []
        text += " " if text else ""
        for piece in section:
            at = len(text)
            text += piece.text
            stream += [(Token(id, at + start, at + end), piece.weight) for id, start, end in tokenize(piece.text)]
        if stream:
            streams.append(stream)
    chunks: list[Chunk] = []
    count, lost = 0, len(text)
    for stream in streams:
        while stream:
            if len(chunks) == limit:
                count, lost = count + len(stream), min(lost, stream[0][0].start)
                break
            last = len(chunks) + 1 == limit
            size = window.room if last else _end(stream, text, window)
            chunks.append(Chunk(tuple(token.id for token, _ in stream[:size]), tuple(w for _, w in stream[:size])))
            stream = stream[size:]
    chunks = chunks or [Chunk()]
    used = sum(len(chunk.ids) + 2 for chunk in chunks)
    return Laid(tuple(chunks), _whole_words(text, lost) if count else "", used, used + count)


@dataclass(frozen=True)
class Sheet:
    """The chunks of a batch of prompts, each distinct one once, ready for a text encoder.

    ids, mask: (N, L) int64; mask is 1 from the start mark to the end mark. weights: (N, L) float32. rows: (P, K), which
    of the N chunks stand side by side for each prompt.
    """

    ids: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    rows: np.ndarray

    def states(self, states: Array) -> Array:
        """(P, K·L, D) from the encoder's states (N, L, D) of `ids`: weighted, then side by side."""
        states = weighted(states, self.weights)
        xp = namespace(states)
        each, (length, width) = self.rows.shape[0], states.shape[1:]
        index = xp.asarray(self.rows.reshape(-1), device=states.device)
        return xp.reshape(xp.take(states, index, axis=0), (each, self.rows.shape[1] * length, width))

    def pooled(self, pooled: Array) -> Array:
        """(P, D) from the encoder's pooled states (N, D): those of each prompt's first chunk, as in the web UI."""
        xp = namespace(pooled)
        return xp.take(pooled, xp.asarray(self.rows[:, 0], device=pooled.device), axis=0)


def sheet(prompts: Sequence[Laid], window: Window) -> Sheet:
    """The sheet of a batch of prompts.

    Where their numbers of chunks differ, each prompt's chunks are repeated to the least common multiple: attention
    over keys that are all repeated is attention over the keys, so a prompt means beside others what it means alone.
    Raises InputError where that would be more than four times the longest prompt (`fit_together`).
    """
    distinct = list(dict.fromkeys(chunk for laid in prompts for chunk in laid.chunks))
    place = {chunk: number for number, chunk in enumerate(distinct)}
    counts = sorted({len(laid.chunks) for laid in prompts})
    columns = math.lcm(*counts)
    if not fit_together(counts):
        said = f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"
        raise InputError(f"prompts of {said} chunks do not fit into one batch; render them in calls of their own")
    ids = np.full((len(distinct), window.length), window.pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    weights = np.ones(ids.shape, dtype=np.float32)
    for row, chunk in enumerate(distinct):
        used = len(chunk.ids)
        ids[row, : used + 2] = (window.start, *chunk.ids, window.end)
        mask[row, : used + 2] = 1
        weights[row, 1 : used + 1] = chunk.weights
    rows = [[place[chunk] for chunk in laid.chunks] * (columns // len(laid.chunks)) for laid in prompts]
    return Sheet(ids, mask, weights, np.asarray(rows, dtype=np.int64))


def fit_together(counts: Sequence[int]) -> bool:
    """Whether prompts of so many chunks each are repeated to one length, which is no more than `REPEATS` longest."""
    return len(set(counts)) == 1 or math.lcm(*counts) <= REPEATS * max(counts)


def weighted(states: Array, weights: np.ndarray) -> Array:
    """States (N, L, D) times their tokens' weights (N, L), each row brought back to its own mean, as in the web UI.

    A mean that is nought but for rounding says nothing of size; such a row is left as weighted. The factor stays
    within the row's least and largest weight, as it does of itself where the tokens' means are of one sign. A row
    that weighs 1 throughout is left to the bit.
    """
    heavy = (weights != 1).any(axis=1)
    if not heavy.any():
        return states
    xp = namespace(states)

    def mean(x: Array) -> np.ndarray:
        found = xp.mean(xp.reshape(x, (x.shape[0], -1)), axis=1)
        return np.asarray([float(value) for value in found], dtype=np.float64)

    changed = states * like(weights[:, :, None], states)
    before, after = mean(states), mean(changed)
    telling = heavy & (np.abs(before) > 1e-4 * mean(xp.abs(states))) & (after != 0)
    grown = np.divide(after, before, out=np.ones_like(after), where=telling)
    low, high = np.maximum(weights.min(axis=1), 1e-2), weights.max(axis=1)  # the marks weigh 1, so low <= 1 <= high
    return changed * like((1 / np.clip(grown, low, high))[:, None, None], states)


def alike(one: Array, other: Array) -> tuple[Array, Array]:
    """States (B, L1, D) and (B, L2, D) repeated along the tokens to one length, which attention does not notice."""
    length = math.lcm(int(one.shape[1]), int(other.shape[1]))
    xp = namespace(one)
    first, second = (xp.concat((x,) * (length // int(x.shape[1])), axis=1) for x in (one, other))
    return first, second


class ReadsPrompts:
    """What a text encoder can say of a prompt, from its window and its tokens."""

    window: Window

    def tokens(self, text: str) -> list[Token]:
        """A text's tokens, without marks."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """The context length L in tokens, the start and end marks included."""
        return self.window.length

    def lay(self, prompt: str, *, weights: bool = False, limit: int | None = 1) -> Laid:
        """A prompt as chunks, `limit` at most. weights: brackets weigh, BREAK parts chunks; else all is text."""
        return lay(parse(prompt) if weights else literal(prompt), self.tokens, self.window, limit)

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, the start and end marks included; more than `length` is cut."""
        return self.lay(prompt).count

    def cut(self, prompt: str) -> str:
        """The words of a prompt that lie beyond the context length, as they were written; "" where all fits."""
        return self.lay(prompt).lost


@dataclass
class _Run:
    """Text as it is parsed. plain: a bracket or an escape, in which no BREAK is looked for."""

    text: str
    weight: float = field(default=1.0)
    plain: bool = False


def _weigh(runs: list[_Run], opening: int, factor: float) -> None:
    """The bracket at `opening` is closed: it is no text any more, and what follows it is weighed."""
    runs[opening].text = ""
    for run in runs[opening:]:
        run.weight *= factor


def _append(section: list[Piece], text: str, weight: float) -> None:
    if not text:
        return
    if section and section[-1].weight == weight:
        text = section.pop().text + text
    section.append(Piece(text, weight))


def _end(stream: Sequence[tuple[Token, float]], text: str, window: Window) -> int:
    """How many tokens of a stream the next chunk takes."""
    room = window.room
    if len(stream) <= room:
        return len(stream)
    words = [text[token.start : token.end].strip() for token, _ in stream[: room + 1]]
    if words[room] == ",":
        return room
    full = next((size for size in range(room, 0, -1) if not _of_one_word(stream[size - 1][0], stream[size][0])), room)
    for size in range(full, max(room - window.near, 0), -1):
        if words[size - 1] == ",":
            return size
    for size in range(full, max(room - window.near, 0), -1):
        if not _torn(stream[size - 1][0], stream[size][0], text):
            return size
    return full


def _of_one_word(one: Token, other: Token) -> bool:
    """Whether two tokens stand for the same characters, as the vectors of a new word do."""
    return one[1:] == other[1:]


def _torn(one: Token, other: Token, text: str) -> bool:
    """Whether two tokens are parts of one word."""
    joined = one.end == other.start and text[other.start - 1 : other.start + 1].isalnum()
    return joined or _of_one_word(one, other)


def _whole_words(text: str, start: int) -> str:
    """The words of a text from `start` on; a word that is torn there is said whole."""
    while 0 < start < len(text) and text[start - 1 : start + 1].isalnum():
        start -= 1
    return text[start:].strip()
