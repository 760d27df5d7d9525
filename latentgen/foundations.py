"""What a U-Net stands on: data, tokenizer, CLIP, VAE, text encoder; and how the stages of a run are run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import save

from latentgen.checkpoint import check_safetensors
from latentgen.data import Buckets, Ledger
from latentgen.data.remote import as_told
from latentgen.data.variants import Varied
from latentgen.durable import write_file, write_folder
from latentgen.errors import InputError
from latentgen.models import create
from latentgen.recipe import Recipe, Train
from latentgen.training.autoencoder import AutoencoderLoss, AutoencoderObjective, folded, normalise_latents
from latentgen.training.cache import Items, cached_items, content_of, latent_items, text_items
from latentgen.training.clip import ClipObjective
from latentgen.training.denoise import BucketLatents, Latents, TextStates
from latentgen.training.finish import state_of
from latentgen.training.intake import (
    Shaped,
    TrainingData,
    divide,
    in_shapes,
    keep_ledger,
    look_over,
    read_pictures,
    unknown_weights,
)
from latentgen.training.layout import LayoutObjective
from latentgen.training.loop import LoopSettings
from latentgen.training.optimizer import check_optimizers
from latentgen.training.precision import accelerator_for
from latentgen.training.stage import Pace, Report, fingerprint, run_stage, settings_fingerprint

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer


def buckets_of(recipe: Recipe) -> Buckets | None:
    """The shapes a recipe asks for. Raises InputError where the networks cannot take them."""
    asked, size = recipe.data.buckets, recipe.data.size
    if asked is None:
        return None
    if recipe.data.upscale:
        raise InputError("upscale in [data] is said of squares; with [data.buckets] write it there")
    least = 2 ** (len(recipe.vae.channels) - 1 + len(recipe.unet.channels) - 1)
    step = asked.step or least
    if step % least:
        raise InputError(f"step {step} in [data.buckets] does not suit VAE and U-Net; give a multiple of {least}")
    if recipe.unet.align:
        raise InputError("align compares pictures with squares, which buckets are not; set align = 0 or take one away")
    return Buckets.around(size, step, asked.ratio, asked.largest_crop, asked.upscale)


@dataclass
class Foundations:
    """What a U-Net of a recipe stands on; each stage is made when a later one asks for it."""

    recipe: Recipe
    out: Path
    folder: Path
    say: Report
    ledger: Ledger = field(init=False, repr=False)
    placed: str = field(default="", init=False, repr=False)  # of the pictures: how many are in a split by their folder
    keeps: ClassVar[bool] = True  # what it finds out; a rehearsal does not

    def __post_init__(self) -> None:
        check_optimizers(section.train.optimizer for _, section in self.recipe if hasattr(section, "train"))

    @cached_property
    def state(self) -> Path:
        """Where the run keeps its own things."""
        return state_of(self.out)

    @cached_property
    def accelerator(self) -> Accelerator:
        """Devices, precision and processes."""
        return accelerator_for(self.recipe.precision)

    def report(self, line: str) -> None:
        """One line, from the main process alone."""
        if self.accelerator.is_main_process:
            self.say(line)

    # --- data

    @cached_property
    def buckets(self) -> Buckets | None:
        """The shapes of the U-Net's pictures, where the recipe asks for them."""
        return buckets_of(self.recipe)

    @cached_property
    def data(self) -> TrainingData:
        """Pictures and captions; what cannot be used is listed."""
        what = self.recipe.data
        shapes = self.buckets or Buckets.square(what.size, what.upscale)
        with self.accelerator.main_process_first():
            folder, pixels, remark = read_pictures(
                self.folder,
                what.size,
                self.state / "cache",
                captions=what.captions,
                background=what.background,
                held_out=what.held_out,
                part=what.hold_out,
                folders=what.folders,
                buckets=shapes,
            )
            if self.accelerator.is_main_process:
                self.ledger = look_over(folder, what.size, what.background, self.state / "cache", shapes)
        for problem in (*folder.problems, *pixels.problems):
            self.report(f"data: left out {problem.path}: {problem.reason}")
        data = divide(self.folder, pixels, what.held_out, what.weights)
        if self.buckets is not None:
            with self.accelerator.main_process_first():
                data = in_shapes(data, folder.root, self.buckets, self.state / "cache", what.background)
            self.report(f"data: buckets {data.shaped_line}")
        self.placed = folder.remark
        for line in filter(None, (folder.remark, remark)):
            self.report(line)
        for line in unknown_weights(data.pictures, what.weights):
            self.report(line)
        self.report(
            f"data: {len(data.pictures)} pictures to train on, {len(data.held)} held out, from {as_told(self.folder)}"
        )
        return data

    # --- tokenizer

    @cached_property
    def words(self) -> CLIPTokenizer:
        """The tokenizer: learned, or read back."""
        what = self.recipe.tokenizer
        place = self._place("tokenizer", what.model_dump(), self.data.captions.fingerprint())
        captions = self.data.captions.texts
        with self.accelerator.main_process_first():  # whether it is there yet is asked in one place alone
            if self.accelerator.is_main_process and not (place / "tokenizer_config.json").is_file():
                learned = create.tokenizer(captions, what.vocabulary, what.context)
                write_folder(place, lambda aside: learned.save_pretrained(aside) and None)
        return self._reported(create.read_tokenizer(place))

    def _reported(self, words: CLIPTokenizer) -> CLIPTokenizer:
        context = words.model_max_length
        texts = [*self.data.captions.texts]
        lengths = [len(ids) for ids in words(texts).input_ids]
        cut = sum(length > context for length in lengths)
        self.figures["tokenizer"] = {"vocabulary": len(words), "captions": len(lengths), "captions_cut": cut}
        self.report(
            f"tokenizer: {len(words)} tokens; {len(lengths)} captions, the longest {max(lengths)} tokens; "
            f"{cut} are cut at {context}"
        )
        if self.accelerator.is_main_process:
            texts += sorted({text for picture in self.data.held for text in picture.captions}.difference(texts))
            lengths += [len(ids) for ids in words(texts[len(lengths) :]).input_ids] if len(texts) > len(lengths) else []
            self.report(
                keep_ledger(
                    self.ledger, dict(zip(texts, lengths, strict=True)), words, self.state if self.keeps else None
                )
            )
        return words

    @cached_property
    def figures(self) -> dict[str, Any]:
        """What each stage reached."""
        return {}

    # --- CLIP

    @cached_property
    def clip(self) -> CLIPModel:
        """Both towers, trained."""
        what, size = self.recipe.clip, self.recipe.data.size
        form = what.model_dump(exclude={"gate", "train"})
        depends = form, loop_of(what.train), self.data.fingerprint, self.words.get_vocab()
        place, context = self._place("clip", *depends), int(self.words.model_max_length)
        if other_context(place, context):  # of before the context was one of the things that it depends on
            place = self._place("clip", *depends, context)
        self._seed()
        model = create.clip(self.words, size=size, **form)
        objective = ClipObjective(
            model,
            self.words,
            self.data.pixels,
            self.data.captions,
            (self.data.held_pixels, self.data.held_captions),
            self.data.weights,
            self.accelerator,
        )
        self._run("clip", objective, what.train, what.gate, place)
        return model.eval().requires_grad_(False)

    # --- VAE

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, trained, its latents normalised."""
        what, size = self.recipe.vae, self.recipe.data.size
        form = what.model_dump(exclude={"gate", "train", "loss"})
        terms = AutoencoderLoss(**what.loss.model_dump())
        tower = self.clip.vision_model if terms.perceptual else None
        seen = content_of(tower) if tower is not None else None
        place = self._place(
            "vae", form, _told(what.loss, "equivariance", "matching"), loop_of(what.train), self.data.fingerprint, seen
        )
        self._seed()
        vae = create.autoencoder(size=size, **form)
        objective = AutoencoderObjective(
            vae, tower, self.data.pixels, self.data.held_pixels, self.data.weights, terms, self.accelerator
        )
        figures = self._run("vae", objective, what.train, what.gate, place)
        self.figures["vae"] = {**figures, **self._normalised(vae, place)}
        return vae.eval().requires_grad_(False)

    def _normalised(self, vae: AutoencoderKL, place: Path) -> Mapping[str, float]:
        """Normalise its latents by what was measured once, and is kept in its stage's `place`.

        Measured anew, on another machine or on a GPU, it would differ in last bits, and the U-Net start over.
        """
        kept = place / f"normalised-{content_of(vae)}.safetensors"  # of these weights: a longer run has others
        with self.accelerator.main_process_first():
            if not kept.is_file():
                measured = normalise_latents(vae, self.data.pixels, self.accelerator.device)
                write_file(kept, save(folded(vae), {"figures": json.dumps(dict(measured))}))
        with safe_open(kept, framework="pt") as file:
            figures: dict[str, float] = json.loads(file.metadata()["figures"])
            vae.load_state_dict({name: file.get_tensor(name) for name in folded(vae)}, strict=False)
        vae.register_to_config(scaling_factor=figures["scaling_factor"])
        self.report("vae: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()))
        return figures

    # --- text encoder

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """CLIP's text tower, as the pipeline holds it; where the recipe asks for it, with the layout learned."""
        return self._laid_out(create.text_tower(self.clip))

    def _laid_out(self, text: CLIPTextModel) -> CLIPTextModel:
        what, data = self.recipe.layout, self.data
        if what is None:
            return text
        form = what.model_dump(exclude={"gate", "train"})
        place = self._place("layout", form, loop_of(what.train), data.fingerprint, content_of(text))
        self._seed()
        objective = LayoutObjective(
            text,
            self.words,
            data.pixels,
            data.captions,
            (data.held_pixels, data.held_captions),
            data.weights,
            self.accelerator,
            **form,
        )
        self._run("layout", objective, what.train, what.gate, place)
        return text.eval().requires_grad_(False)

    # --- shared by the stages

    def _latents(self, pixels: np.ndarray | Varied) -> Latents:
        """Pictures of one shape as the VAE encodes them."""
        return Latents(self._cached(latent_items(self.vae, pixels, self.accelerator.device)))

    def _shaped_latents(self, pixels: np.ndarray, shaped: Shaped | None) -> Latents:
        """Squares, or the same pictures in the shapes of their buckets."""
        if shaped is None:
            return self._latents(pixels)
        return self._bucketed(shaped, shaped.pixels)

    def _bucketed(self, shaped: Shaped, pixels: Sequence[np.ndarray | Varied]) -> BucketLatents:
        """Pictures in the shapes of their buckets, or a version of them."""
        arrays = [self._latents(own).moments for own in pixels]
        return BucketLatents(arrays[0][:0], tuple(arrays), shaped.bucket, shaped.row)

    def _states(self, texts: Sequence[str]) -> TextStates:
        """Texts as the text encoder has them."""
        return TextStates(self._cached(text_items(self.text_encoder, self.words, texts, self.accelerator.device)))

    def _place(self, name: str, *depends: Any) -> Path:
        return self.state / f"{name}-{fingerprint(self.recipe.seed, *depends)}"

    def _seed(self) -> None:
        """Weights start from the recipe's seed, whichever stages ran before."""
        torch.manual_seed(self.recipe.seed)

    def _run(
        self, name: str, objective: Any, what: Train, gate: Mapping[str, float], place: Path
    ) -> Mapping[str, float]:
        figures = run_stage(
            name,
            objective,
            LoopSettings(**what.model_dump()),
            place,
            self.accelerator,
            seed=self.recipe.seed,
            gate=gate,
            pace=Pace(**self.recipe.pace.model_dump()),
            report=self.report,
            held_out="" if name == "vae" else self.data.held_fingerprint,  # the autoencoder reads no captions
        )
        self.figures[name] = dict(figures)
        return figures

    def _cached(self, items: Items) -> np.ndarray:
        with self.accelerator.main_process_first():
            return cached_items(self.state / "cache", items, self.report)


def other_context(place: Path, context: int) -> bool:
    """Whether the CLIP of a stage's place reads texts of another length than `context` tokens."""
    for file in place.glob("checkpoints/*/model.safetensors"):
        with suppress(InputError):  # torn ones say nothing
            for name, entry in check_safetensors(file).items():
                if name.endswith("text_model.embeddings.position_embedding.weight"):
                    return int(entry["shape"][0]) != context
    return False


def _told(section: BaseModel, *later: str) -> Mapping[str, Any]:
    """A recipe's section; of the keys that came later, those that are not at their default."""
    told = section.model_dump()
    return {k: v for k, v in told.items() if k not in later or v != type(section).model_fields[k].default}


def loop_of(what: Train) -> Mapping[str, Any]:
    return settings_fingerprint(LoopSettings(**what.model_dump()))
