"""What the starting weights rendered before they were changed: for DreamBooth to keep, and to measure forgetting."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from latentgen.finetuning.base import Base
from latentgen.training.cache import cached
from latentgen.training.stage import Report, fingerprint

CHECKED = 16  # renderings that forgetting is measured on
A_TIME = 8


def render_prior(
    base: Base, prompts: Sequence[str], size: int, cache: Path, what: str, report: Report, first_seed: int = 0
) -> np.ndarray:
    """Latents (N, C, h, w) float32 of one rendering for each prompt, picture k from seed first_seed + k; kept.

    Rendered by the starting weights with their own defaults, guidance included, once.
    """
    terms, factor = base.pipe.terms, base.pipe.terms.factor
    shape = (len(prompts), terms.channels, size // factor, size // factor)
    key = fingerprint(base.checkpoint.fingerprint, list(prompts), size, first_seed)
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
