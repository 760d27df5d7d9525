"""Tune a weights folder: the way to render that is best by a held-out figure at a price, made its default."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.checkpoint import Checkpoint, find, open_checkpoint, write_defaults
from latentgen.data import Picture, load_pixels
from latentgen.diffusion.schedule.reading import as_pipelines_take
from latentgen.durable import alone
from latentgen.errors import InputError
from latentgen.evaluation.division import Asked, divided, division_of
from latentgen.evaluation.encoders import Encoder, open_judge
from latentgen.evaluation.run import BATCH, Artist
from latentgen.pipeline import Pipeline, terms_of
from latentgen.tuning import averages
from latentgen.tuning.grid import GUIDANCES, TRIED, Candidate, evaluations, grid
from latentgen.tuning.search import FIGURES, Rated, halve, rate

REAL = 400  # held-out pictures the figure is against, at most
Report = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """evaluations: rows the network may be given for a picture. pictures: rendered by candidates of the last round.

    asked: what is held out, where it is not what the weights' own recipe says.
    """

    data: Path
    evaluations: int
    pictures: int = 48
    seed: int = 0
    judge: str | None = None
    figure: str = "kid"
    samplers: tuple[str, ...] = TRIED
    guidances: tuple[float, ...] = GUIDANCES
    asked: Asked = field(default_factory=Asked)


@dataclass(frozen=True)
class Tuned:
    """chosen: the best of `rated`, and where averages were kept of `widths`; or what was `before`, the defaults there
    were, where over all pictures nothing is better.
    """

    name: str
    figure: str
    chosen: Candidate
    rated: list[Rated[Candidate]]
    widths: list[Rated[Candidate]]
    before: Rated[Candidate]

    @property
    def kept(self) -> bool:
        """Whether the defaults stay what they were."""
        return self.chosen == self.before.candidate

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return asdict(self)


def tune(
    weights: str | Path,
    order: Order,
    cache: Path,
    report: Report,
    write: bool = True,
    keep: Callable[[Tuned], None] = lambda _: None,
) -> Tuned:
    """Search, and (write) make the best the folder's defaults. A stopped search goes on from `cache`.

    keep: told what was found before the folder is changed, which it is not where that cannot be kept.
    Raises InputError with one line, before anything is rendered where it can.
    """
    checkpoint = open_checkpoint(find(weights))
    if order.figure not in FIGURES:
        raise InputError(f"--figure is {order.figure!r}; it can be one of: {', '.join(FIGURES)}")
    if order.evaluations < 1 or order.pictures < 2:
        raise InputError("--evaluations must be 1 or more, and --pictures 2 or more")
    if order.seed < 0:
        raise InputError(f"--seed is {order.seed}; it must be 0 or more")
    if write and checkpoint.folder.is_file():
        raise InputError(f"{weights} is a single file, whose defaults are not rewritten; convert it, or give --dry-run")
    scheduler = as_pipelines_take(checkpoint.config("scheduler"), checkpoint.has_second)
    candidates = grid(scheduler, order.evaluations, samplers=order.samplers, guidances=order.guidances)
    with alone(cache):
        bench = Bench.of(checkpoint, weights, order, cache, report)
        rounds = rounds_of(len(bench.captions))
        before = bench.present(scheduler)
        if before.evaluations <= order.evaluations and before not in candidates:
            candidates.append(before)  # what there is may be kept
        report(f"{len(candidates)} ways to render for {order.evaluations} evaluations or less, by {bench.figure}")
        rated = halve(candidates, bench.look, bench.score, rounds, order.seed, report)
        chosen = rated[0].candidate
        widths, tensors = bench.widths(chosen)
        if widths:
            chosen = widths[0].candidate
        both = rate(
            [before, chosen], [bench.look(each, rounds[-1]) for each in (before, chosen)], bench.score, rounds[-1]
        )
        if before.evaluations <= order.evaluations and both[0].candidate is before:
            chosen = before  # with few pictures it may have fallen out
        found = Tuned(
            checkpoint.folder.resolve().name,
            bench.figure,
            chosen,
            rated,
            widths,
            next(each for each in both if each.candidate is before),
        )
        keep(found)
        if write:
            settle(checkpoint, found, order, tensors.get(chosen.width))
    return found


def settle(checkpoint: Checkpoint, found: Tuned, order: Order, tensors: Any) -> None:
    """Write the choice into the weights folder, with a word on how it was made."""
    chosen = found.chosen
    defaults: dict[str, Any] = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    defaults |= {"sampler": chosen.sampler, "guidance_interval": chosen.interval}
    best = found.before if found.kept else (found.widths or found.rated)[0]
    told: dict[str, Any] = {"evaluations": order.evaluations, "figure": found.figure, "value": best.value}
    told |= {"interval": [best.low, best.high], "pictures": best.pictures, "average": chosen.width}
    change = None if tensors is None else partial(averages.put, tensors=tensors)
    write_defaults(checkpoint.folder, defaults, change, notes={"tuned": told})


def rounds_of(pictures: int) -> list[int]:
    """8, 16, 32 … and at last all."""
    counts = [BATCH]
    while counts[-1] * 2 < pictures:
        counts.append(counts[-1] * 2)
    return [*(count for count in counts if count < pictures), pictures]


@dataclass
class Bench:
    """What candidates are tried on: captions, the judge, the figure; renderings are kept as an evaluation's are."""

    checkpoint: Checkpoint
    artist: Artist
    judge: Encoder
    captions: list[str]
    figure: str
    score: Any
    cache: Path
    report: Report
    kept: list[averages.Stored]
    others: dict[float, Artist]

    @classmethod
    def of(cls, checkpoint: Checkpoint, weights: str | Path, order: Order, cache: Path, report: Report) -> "Bench":
        """Reads the held-out pictures and opens judge and pipeline."""
        judge = open_judge(order.judge)
        division, remark = division_of(checkpoint.folder, order.asked)
        held, _ = divided(order.data, division)
        if len(held) < 3:
            found = f"{len(held)} pictures in split {division.split!r}"
            raise InputError(f"{order.data} has {found}; tuning needs 3 or more")
        if remark:
            report(remark)
        held = shuffled(held, REAL, order.seed)
        real = load_pixels(held, terms_of(checkpoint).size, cache / "pixels", division.background)
        features = judge.features(np.asarray(real.array), cache / "features")
        captions = [picture.captions[0] for picture in real.pictures][: order.pictures]
        name, kind = FIGURES[order.figure]
        pipe = Pipeline.from_pretrained(weights)
        artist = Artist(pipe, checkpoint.fingerprint, {}, order.seed, cache / "renderings", lambda _: None)
        kept = averages.find_averages(checkpoint, report)
        return cls(checkpoint, artist, judge, captions, name, kind(features), cache, report, kept, {})

    def look(self, candidate: Candidate, count: int) -> np.ndarray:
        """Features (count, D) of the first captions' renderings, the same noise for every candidate."""
        artist = self.artist if candidate.width is None else self.others[candidate.width]
        artist = replace(artist, settings=candidate.settings())
        return self.judge.features(artist.draw(self.captions[:count]), self.cache / "features")

    def present(self, scheduler: Any) -> Candidate:
        """The weights' own defaults as they are."""
        terms = self.artist.pipe.terms
        cost = evaluations(scheduler, terms.sampler, terms.steps, terms.guidance, terms.interval)
        return Candidate(terms.sampler, terms.steps, terms.guidance, terms.interval, cost)

    def widths(self, chosen: Candidate) -> tuple[list[Rated[Candidate]], dict[float | None, Any]]:
        """Every average that can be made, under the settings chosen, and the weights as they are; best first."""
        if not self.kept:
            return [], {}
        tensors: dict[float | None, Any] = {}
        for width in averages.widths_near(self.kept):
            tensors[width] = averages.weights_of(self.checkpoint, self.kept, width)
            place = averages.trial(self.checkpoint, tensors[width], self.cache / f"average-{width:g}")
            pipe = Pipeline.from_pretrained(place, engine="torch")
            other = open_checkpoint(place)
            self.others[width] = replace(self.artist, pipe=pipe, fingerprint=other.fingerprint)
        tried = [chosen, *(replace(chosen, width=width) for width in self.others)]
        self.report(f"averages of the weights: {len(tried)}, {len(self.captions)} pictures each")
        features = [self.look(each, len(self.captions)) for each in tried]
        return rate(tried, features, self.score, len(self.captions)), tensors


def shuffled(pictures: Sequence[Picture], count: int, seed: int) -> tuple[Picture, ...]:
    """At most `count`, in an order of the seed's: folders are sorted, and the first captions shall be like all."""
    return tuple(pictures[k] for k in np.random.default_rng(seed).permutation(len(pictures))[:count])
