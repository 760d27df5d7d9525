"""Evaluate a weights folder on captioned pictures: render held-out captions, then ask a judge.

Renderings and features are kept beside the report and found again by their content, so a stopped run goes on.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentgen import __version__
from latentgen.checkpoint import find, open_checkpoint
from latentgen.data import Picture, load_pixels
from latentgen.errors import InputError
from latentgen.evaluation.division import Asked, divided, division_of
from latentgen.evaluation.encoders import INCEPTION, Encoder, open_judge
from latentgen.evaluation.kept import kept
from latentgen.evaluation.levels import Inside, Level, look_inside
from latentgen.evaluation.metrics import (
    Figure,
    cmmd_figure,
    frechet_figure,
    kid_figure,
    manifold_figures,
    mean_figure,
    psnr_rows,
    ratio_figure,
    retrieval_rows,
    score_rows,
    ssim_rows,
    unit,
)
from latentgen.evaluation.neighbours import Copies, copy_limit, find_copies
from latentgen.evaluation.pairs import STYLES, column, labels_of, seen_and_held_out, seen_rows
from latentgen.evaluation.style import LEARNT_FROM, StyleProbe, style_encoder
from latentgen.evaluation.sweep import Sweep, sweep
from latentgen.image import to_bytes
from latentgen.pipeline import Pipeline, terms_of

BATCH = 8
FRECHET = "Fréchet distance"  # the FID where Inception judges, and only there
DIVERSE, EACH = 8, 4  # prompts rendered several times, and how often
Report = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is asked for. pictures: held-out ones rendered, at most; and for each a seen one. None: the default.

    guidances, step_counts: values of curves, each rendered with `curve_pictures` of the held-out captions. asked: what
    is held out, where it is not what the weights' own recipe says.
    """

    data: Path
    pictures: int = 400
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int = 0
    judge: str | None = None
    clip: str | None = None
    concept: str | None = None
    style: str | None = None
    guidances: tuple[float, ...] = ()
    step_counts: tuple[int, ...] = ()
    curve_pictures: int = 24
    asked: Asked = field(default_factory=Asked)


@dataclass(frozen=True)
class Seen:
    """Renderings (N, H, W, 3) uint8 of captions that were trained on, and the training pictures nearest to them."""

    captions: list[str]
    renderings: np.ndarray = field(repr=False)
    copies: Copies = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """figures: by name. renderings, real: (N, H, W, 3) uint8 of `captions`; likeness: cosine of the two, (N,).

    copies: nearest rows of `training` (M, H, W, 3). seen: the same of training captions.
    """

    name: str
    settings: dict[str, Any]
    figures: dict[str, Figure]
    levels: list[Level]
    captions: list[str]
    renderings: np.ndarray = field(repr=False)
    real: np.ndarray = field(repr=False)
    likeness: np.ndarray = field(repr=False)
    training: np.ndarray = field(repr=False)
    copies: Copies = field(repr=False)
    seen: Seen = field(repr=False)
    sweeps: list[Sweep] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        figures = {name: asdict(figure) for name, figure in self.figures.items()}
        levels = [asdict(level) for level in self.levels]
        told = {"weights": self.name, "settings": self.settings, "figures": figures, "levels": levels}
        return {**told, "sweeps": [each.as_dict() for each in self.sweeps]}


def evaluate(weights: str | Path | None, order: Order, cache: Path, report: Report = lambda _: None) -> Evaluation:
    """Render and judge. cache: a folder for renderings and features. Raises InputError with one line."""
    if order.pictures < 3:
        raise InputError(f"--pictures is {order.pictures}; an evaluation needs 3 or more")
    if order.seed < 0:
        raise InputError(f"--seed is {order.seed}; it must be 0 or more")
    if order.curve_pictures < 2:
        raise InputError(f"--curve-pictures is {order.curve_pictures}; a curve needs 2 or more")
    checkpoint = open_checkpoint(find(weights))
    size = terms_of(checkpoint).size
    judge = open_judge(order.judge)
    clip = open_judge(order.clip) if order.clip else None
    if clip is not None and clip.texts is None:
        raise InputError(f"--clip {order.clip} is no CLIP; give a folder of a CLIP model")
    division, remark = division_of(checkpoint.folder, order.asked)
    held, training = divided(order.data, division)
    if len(held) < 3 or len(training) < 2:
        found = f"{len(held)} pictures in split {division.split!r} and {len(training)} others"
        raise InputError(f"{order.data} has {found}; an evaluation needs 3 held out and 2 for training")
    held = choose(held, order.pictures, order.seed)
    if remark:
        report(remark)
    report(f"{len(held)} held-out pictures, {len(training)} for training, {size} px, judge {judge.name}")
    real, known = (load_pixels(some, size, cache / "pixels", division.background) for some in (held, training))
    captions = [picture.captions[0] for picture in real.pictures]
    labels = labels_of(real.pictures, known.pictures, order.concept, order.style)
    some = seen_rows(labels, len(known.pictures), len(captions), order.seed)
    taught = [known.pictures[k].captions[0] for k in some]

    pipe = Pipeline.from_pretrained(weights)
    settings = settled(pipe, order)
    artist = Artist(pipe, checkpoint.fingerprint, settings, order.seed, cache / "renderings", report)
    drawn = artist.draw(captions)
    many = list(dict.fromkeys(captions[k] for k in mixed(len(captions), order.seed)))[:DIVERSE]
    several = artist.draw([caption for caption in many for _ in range(EACH)])
    drawn_seen = artist.draw(taught)

    report("features")

    def see(pixels: Any) -> np.ndarray:
        return judge.features(np.asarray(pixels), cache / "features")

    ours, theirs, all_known = see(drawn), see(real.array), see(known.array)
    figures = compare(ours, theirs, order.seed)
    draws = np.random.default_rng(order.seed).permutation(len(all_known))[: len(theirs)]
    floor = compare(all_known[draws], theirs, order.seed) if len(draws) >= 3 else {}
    figures |= {f"{name} (training pictures)": figure for name, figure in floor.items() if name != "own picture at 1"}
    figures["diversity within a prompt"] = diversity(see(several), EACH, order.seed)
    limit, again = copy_limit(all_known), see(drawn_seen)
    copies, seen_copies, real_copies = (find_copies(each, all_known, limit) for each in (ours, again, theirs))
    figures["memorised"] = mean_figure(copies.flagged, order.seed)
    figures["memorised (held-out pictures)"] = mean_figure(real_copies.flagged, order.seed)
    figures["memorised, of training captions"] = mean_figure(seen_copies.flagged, order.seed)
    if labels is not None:
        figures |= seen_and_held_out(labels, (ours, theirs, all_known), some, again, order.seed)
    shown = drawn, np.asarray(real.array), known.array
    figures |= style_figures(order, real.pictures, known.pictures, shown, cache / "features")
    if clip is not None:
        figures |= with_clip(clip, drawn, np.asarray(real.array), captions, cache / "features", order.seed)
    sweeps = curves(order, artist, captions, see, theirs)
    report("losses and reconstructions")
    inside = look_inside(checkpoint, np.asarray(real.array), captions, order.seed)
    figures |= inner_figures(inside, np.asarray(real.array), see, theirs, order.seed)
    told = {**dict(artist.settings.items()), "seed": order.seed, "data": order.data.name}
    told |= {"held out": division.split, "part": division.part}
    told |= {"judge": judge.name, "weights": checkpoint.fingerprint, "chance of own picture": 1 / len(captions)}
    likeness = (unit(ours) * unit(theirs)).sum(1)
    if judge.name == INCEPTION:
        figures = {name.replace(FRECHET, "FID"): figure for name, figure in figures.items()}
    return Evaluation(
        checkpoint.folder.resolve().name,
        told,
        figures,
        inside.levels,
        captions,
        drawn,
        np.asarray(real.array),
        likeness,
        known.array,
        copies,
        Seen(taught, drawn_seen, seen_copies),
        sweeps,
    )


def settled(pipe: Pipeline, order: Order) -> dict[str, Any]:
    """Steps, guidance and sampler: what is asked, else the weights' own. Renderings are kept under these."""
    own = {
        "num_inference_steps": pipe.terms.steps,
        "guidance_scale": pipe.terms.guidance,
        "sampler": pipe.terms.sampler,
    }
    if pipe.terms.interval is not None:
        own["guidance_interval"] = pipe.terms.interval
    asked = {"num_inference_steps": order.steps, "guidance_scale": order.guidance, "sampler": order.sampler}
    return own | {key: value for key, value in asked.items() if value is not None}


def curves(
    order: Order, artist: "Artist", captions: list[str], see: Callable[[Any], np.ndarray], real: np.ndarray
) -> list[Sweep]:
    """A curve for each setting of which values were asked for; the other settings are the evaluation's."""
    asked = (("guidance_scale", order.guidances), ("num_inference_steps", order.step_counts))

    def draw(settings: dict[str, Any], some: Sequence[str]) -> np.ndarray:
        told = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        artist.report(f"curves: {told}")
        return replace(artist, settings=artist.settings | settings).draw(some)

    turns = mixed(len(captions), order.seed)
    some = [captions[k] for k in turns[: order.curve_pictures]]
    return [sweep(name, values, some, draw, see, real[turns], order.seed) for name, values in asked if values]


def mixed(count: int, seed: int) -> np.ndarray:
    """An order of captions in which the first are like all: folders are sorted, and there the first are alike."""
    return np.random.default_rng(seed).permutation(count)


def choose(pictures: Sequence[Picture], count: int, seed: int) -> tuple[Picture, ...]:
    """At most `count`, drawn by the seed, in their order."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pictures))[:count])
    return tuple(pictures[index] for index in drawn)


def compare(ours: np.ndarray, theirs: np.ndarray, seed: int) -> dict[str, Figure]:
    """Two sets of features in every way there is."""
    found = {FRECHET: frechet_figure(ours, theirs, seed), "KID": kid_figure(ours, theirs, seed)}
    found |= manifold_figures(theirs, ours, seed=seed)
    if len(ours) == len(theirs):
        found["own picture at 1"] = mean_figure(retrieval_rows(ours, theirs), seed)
    return found


def diversity(features: np.ndarray, each: int, seed: int) -> Figure:
    """Mean cosine distance between a prompt's renderings, a number a prompt: features (prompts · each, D)."""
    groups = unit(features).reshape(-1, each, features.shape[1])
    alike = groups @ groups.transpose(0, 2, 1)
    rows = 1 - (alike.sum((1, 2)) - np.trace(alike, axis1=1, axis2=2)) / (each * (each - 1))
    return mean_figure(rows, seed)


def style_figures(
    order: Order,
    held: Sequence[Picture],
    training: Sequence[Picture],
    pixels: tuple[np.ndarray, np.ndarray, np.ndarray],
    cache: Path,
) -> dict[str, Figure]:
    """How often a probe of style (`evaluation.style`) finds the style asked for; pixels: ours, theirs, known."""
    name = column([*held, *training], order.style, STYLES)
    if name is None:
        return {}
    styles = np.array([str(picture.attributes[name]) for picture in training])
    rows = np.sort(np.random.default_rng(order.seed + 2).permutation(len(training))[:LEARNT_FROM])
    if len(np.unique(styles[rows])) < 2:
        return {}
    encoder = style_encoder()
    ours, theirs = (encoder.features(part, cache) for part in pixels[:2])
    probe = StyleProbe.fit(encoder.features(np.asarray(pixels[2])[rows], cache), styles[rows])
    asked = np.array([str(picture.attributes[name]) for picture in held])
    one, other = ((probe(part) == asked).astype(float) for part in (ours, theirs))
    figures = {"style by the probe": mean_figure(one, order.seed)}
    figures["style by the probe (real pictures)"] = mean_figure(other, order.seed)
    if other.any():
        figures["style by the probe, share"] = ratio_figure(one, other, order.seed)
    return figures


def with_clip(
    clip: Encoder, drawn: np.ndarray, real: np.ndarray, captions: list[str], cache: Path, seed: int
) -> dict[str, Figure]:
    """What a CLIP says of renderings, and of the real pictures under the same captions."""
    assert clip.texts is not None
    texts = clip.texts(captions).float().numpy()
    ours, theirs = clip.features(drawn, cache), clip.features(real, cache)
    figures = {"CMMD": cmmd_figure(ours, theirs, seed)}
    for name, pictures in (("", ours), (" (real pictures)", theirs)):
        figures[f"CLIP score{name}"] = mean_figure(score_rows(pictures, texts), seed)
        figures[f"own caption at 1{name}"] = mean_figure(retrieval_rows(pictures, texts, captions), seed)
    return figures


def inner_figures(
    inside: Inside, real: np.ndarray, see: Callable[[Any], np.ndarray], features: np.ndarray, seed: int
) -> dict[str, Figure]:
    """The validation loss, bits, and how well the autoencoder gives pictures back."""
    again = see(inside.reconstructions)
    figures = {"validation loss": inside.loss}
    if inside.bits is not None:
        figures["bits per latent dimension, bound"] = inside.bits
    if inside.pixel_bits is not None:
        figures["bits per pixel dimension, bound"] = inside.pixel_bits
    figures["reconstruction: PSNR, dB"] = mean_figure(psnr_rows(real, inside.reconstructions), seed)
    if min(real.shape[1:3]) >= 11:
        figures["reconstruction: SSIM"] = mean_figure(ssim_rows(real, inside.reconstructions), seed)
    figures[f"reconstruction: {FRECHET}"] = frechet_figure(again, features, seed)
    figures["reconstruction: feature distance"] = mean_figure(1 - (unit(again) * unit(features)).sum(1), seed)
    return figures


@dataclass
class Artist:
    """Renders captions in batches through the pipeline; what was rendered before is read from the cache.

    settings: all that decide a rendering beside weights, caption and seed, with nothing left to defaults.
    """

    pipe: Pipeline
    fingerprint: str
    settings: dict[str, Any]
    seed: int
    cache: Path
    report: Report

    def draw(self, captions: Sequence[str]) -> np.ndarray:
        """(N, H, W, 3) uint8; picture k has the seed seed + k."""
        parts: list[np.ndarray] = []
        for start in range(0, len(captions), BATCH):
            texts = list(captions[start : start + BATCH])
            seeds = [self.seed + start + k for k in range(len(texts))]
            told = json.dumps([*self._by, self.fingerprint, self.settings, texts, seeds], sort_keys=True)
            place = self.cache / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"
            parts.append(kept(place, len(texts), partial(self._render, texts, seeds, len(captions) - start)))
        return np.concatenate(parts)

    @property
    def _by(self) -> tuple[str, str | None]:
        """What renders: this version, and its engine."""
        return __version__, (self.pipe.machine or {}).get("engine")

    def _render(self, texts: list[str], seeds: list[int], left: int) -> np.ndarray:
        self.report(f"rendering, {left} to go")
        out = self.pipe(texts, seed=seeds, output_type="np", prompt_weights=False, **self.settings)
        return to_bytes(np.asarray(out.images))
