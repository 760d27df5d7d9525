"""What the starting weights rendered before they were changed: for DreamBooth to keep, and to measure forgetting."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from latentgen.finetuning.base import Base
from latentgen.training.cache import cached
from latentgen.training.stage import Report, fingerprint

CHECKED = 16  # renderings that forgetting is measured on
A_TIME = 8


def prior_prompts(of_class: str, others: Sequence[str], count: int) -> list[str]:
    """What is not to change: `count` of the class, and as many of the starting weights' own prompts in turn with them.

    Every second one of the class is plain, since captions of the subject are nearest to that; the others take turns
    in the ways that the own prompts name (", twemoji") and plain.
    """
    ways = ("", *dict.fromkeys(told[told.index(",") :] for told in others if "," in told))
    named = ("" if turn % 2 == 0 else ways[(turn + 1) // 2 % len(ways)] for turn in range(count))
    return [told for turn, way in enumerate(named) for told in (of_class + way, others[turn % len(others)])]


def render_prior(
    base: Base, prompts: Sequence[str], size: int, cache: Path, what: str, report: Report, first_seed: int = 0
) -> np.ndarray:
    """Latents (N, C, h, w) float32 of one rendering for each prompt, picture k from seed first_seed + k; kept.

    Rendered by the starting weights with their own defaults, guidance included, once.
    """
    terms, factor = base.pipe.terms, base.pipe.terms.factor
    shape = (len(prompts), terms.channels, size // factor, size // factor)
    defaults = [terms.steps, terms.guidance, terms.sampler, terms.interval]
    key = fingerprint(base.checkpoint.fingerprint, list(prompts), size, first_seed, defaults)
    path = cache / f"prior-{key}.npy"

    def parts() -> Iterator[np.ndarray]:
        report(f"prior: rendering {len(prompts)} {what} with the starting weights")
        for start in range(0, len(prompts), A_TIME):
            rows = range(start, min(start + A_TIME, len(prompts)))
            seeds = [first_seed + row for row in rows]
            asked = [prompts[row] for row in rows]
            made = base.pipe(asked, seed=seeds, height=size, width=size, output_type="latent").images
            yield np.asarray(made.cpu(), dtype=np.float32)

    return cached(path, shape, np.float32, parts)
