"""From a recipe to objects, through explicit tables; and `train`, which runs a recipe's stages in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import BaseModel

from latentgen.checkpoint import save_pipeline
from latentgen.data import Buckets, Ledger
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import from_config
from latentgen.durable import alone, write_file, write_folder
from latentgen.errors import InputError
from latentgen.models import create
from latentgen.models.onnx.export import write_graphs
from latentgen.pixels import build as pixels
from latentgen.recipe import Recipe, Train, read_kind, read_recipe
from latentgen.training import finish
from latentgen.training.autoencoder import AutoencoderLoss, AutoencoderObjective, normalise_latents
from latentgen.training.cache import Items, cached_items, content_of, latent_items, text_items
from latentgen.training.captions import CaptionTable, Variety
from latentgen.training.clip import ClipObjective
from latentgen.training.denoise import BucketLatents, DenoiseObjective, Denoising, Latents, TextStates
from latentgen.training.features import FeatureObjective, FeatureTerms, patch_items
from latentgen.training.intake import Shaped, TrainingData, divide, in_shapes, keep_ledger, look_over, read_pictures
from latentgen.training.layout import LayoutObjective
from latentgen.training.loop import LoopSettings
from latentgen.training.precision import accelerator_for
from latentgen.training.report import write_page
from latentgen.training.sharding import shard, unsharded
from latentgen.training.stage import Pace, Report, fingerprint, run_stage, settings_fingerprint

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer


def train(recipe: Path, out: Path | None = None, data: Path | None = None, report: Report = print) -> Path:
    """Train every stage of a recipe and write the weights folder; what is done already is not done again.

    out: the weights folder, `weights/NAME` if not given; the run's own state (checkpoints, caches, logs, sheets) stands
    beside it in `OUT.training`. data: a captioned folder instead of the recipe's. Returns the weights folder.
    Raises InputError for a recipe, a folder or a gate that does not hold.
    """
    if read_kind(recipe) == "pixels":
        return pixels.train(recipe, out, data, report)
    what = read_recipe(recipe)
    run = Run(what, out or Path("weights") / what.name, data or what.data.folder, report)
    return run.all()


def scheduler_config(recipe: Recipe) -> Mapping[str, Any]:
    """What diffusers' scheduler_config.json says of the recipe's diffusion."""
    return finish.scheduler_config(recipe.unet.schedule, recipe.unet.prediction)


def buckets_of(recipe: Recipe) -> Buckets | None:
    """The shapes a recipe asks for. Raises InputError where the networks cannot take them."""
    asked, size = recipe.data.buckets, recipe.data.size
    if asked is None:
        return None
    least = 2 ** (len(recipe.vae.channels) - 1 + len(recipe.unet.channels) - 1)
    step = asked.step or least
    if step % least:
        raise InputError(f"step {step} in [data.buckets] does not suit VAE and U-Net; give a multiple of {least}")
    if recipe.unet.align:
        raise InputError("align compares pictures with squares, which buckets are not; set align = 0 or take one away")
    return Buckets.around(size, step, asked.ratio, asked.largest_crop, asked.upscale)


@dataclass
class Run:
    """One run of a recipe: each stage is made when a later one asks for it."""

    recipe: Recipe
    out: Path
    folder: Path
    say: Report
    ledger: Ledger = field(init=False, repr=False)
    keeps: ClassVar[bool] = True  # what it finds out; a rehearsal does not

    @cached_property
    def state(self) -> Path:
        """Where the run keeps its own things."""
        return self.out.with_name(f"{self.out.name}.training")

    @cached_property
    def accelerator(self) -> Accelerator:
        """Devices, precision and processes."""
        return accelerator_for(self.recipe.precision)

    def report(self, line: str) -> None:
        """One line, from the main process alone."""
        if self.accelerator.is_main_process:
            self.say(line)

    def all(self) -> Path:
        """Tokenizer, CLIP, layout where it is asked for, VAE, U-Net, weights folder."""
        self.report(f"{self.recipe.name}: on {self.accelerator.device}, {self.accelerator.num_processes} process(es)")
        main = self.accelerator.is_main_process
        with alone(self.state) if main else nullcontext():
            unet, figures = self.unet
            if main:
                self.save(unet, {**self.figures, "unet": dict(figures)})
                self.report(f"{self.recipe.name}: wrote {self.out}")
                page = self.state / "report.html"
                recipe = self.recipe.model_dump(mode="json")
                write_file(page, write_page(self.recipe.name, self.state, self.figures, recipe).encode())
                self.report(f"{self.recipe.name}: curves and sheets are in {page}")
        return self.out

    # --- data

    @cached_property
    def buckets(self) -> Buckets | None:
        """The shapes of the U-Net's pictures, where the recipe asks for them."""
        return buckets_of(self.recipe)

    @cached_property
    def data(self) -> TrainingData:
        """Pictures and captions; what cannot be used is listed."""
        what = self.recipe.data
        with self.accelerator.main_process_first():
            folder, pixels, remark = read_pictures(
                self.folder,
                what.size,
                self.state / "cache",
                captions=what.captions,
                background=what.background,
                held_out=what.held_out,
                part=what.hold_out,
                buckets=self.buckets,
            )
            if self.accelerator.is_main_process:
                self.ledger = look_over(folder, what.size, what.background, self.state / "cache", self.buckets)
        for problem in (*folder.problems, *pixels.problems):
            self.report(f"data: left out {problem.path}: {problem.reason}")
        data = divide(self.folder, pixels, what.held_out, what.weights)
        if self.buckets is not None:
            with self.accelerator.main_process_first():
                data = in_shapes(data, folder.root, self.buckets, self.state / "cache", what.background)
            self.report(f"data: buckets {data.shaped_line}")
        if remark:
            self.report(remark)
        self.report(f"data: {len(data.pictures)} pictures to train on, {len(data.held)} held out, from {self.folder}")
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
        place = self._place("clip", form, _loop(what.train), self.data.fingerprint, self.words.get_vocab())
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
            "vae", form, _told(what.loss, "equivariance"), _loop(what.train), self.data.fingerprint, seen
        )
        self._seed()
        vae = create.autoencoder(size=size, **form)
        objective = AutoencoderObjective(
            vae, tower, self.data.pixels, self.data.held_pixels, self.data.weights, terms, self.accelerator
        )
        figures = self._run("vae", objective, what.train, what.gate, place)
        self.figures["vae"] = {**figures, **self._normalised(vae)}
        return vae.eval().requires_grad_(False)

    def _normalised(self, vae: AutoencoderKL) -> Mapping[str, float]:
        figures = normalise_latents(vae, self.data.pixels, self.accelerator.device)
        self.report("vae: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()))
        return figures

    # --- U-Net

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """CLIP's text tower, as the pipeline holds it; where the recipe asks for it, with the layout learned."""
        return self._laid_out(create.text_tower(self.clip))

    def _laid_out(self, text: CLIPTextModel) -> CLIPTextModel:
        what, data = self.recipe.layout, self.data
        if what is None:
            return text
        form = what.model_dump(exclude={"gate", "train"})
        place = self._place("layout", form, _loop(what.train), data.fingerprint, content_of(text))
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

    @cached_property
    def unet(self) -> tuple[UNet2DConditionModel, Mapping[str, float]]:
        """The U-Net, trained, and its figures."""
        what, data = self.recipe.unet, self.data
        vae, text = self.vae, self.text_encoder
        upstream = (content_of(vae), content_of(text), data.fingerprint)
        form = what.model_dump(include={"channels", "layers", "head_width"}) | ({"pooled": True} if what.pooled else {})
        goal = what.model_dump(include={"schedule", "prediction", "weighting", "caption_dropout"})
        goal |= {key: value for key in ("align", "disperse") if (value := getattr(what, key))}
        if what.times != "uniform":
            goal |= what.model_dump(include={"times", "times_mean", "times_std"})
        captions = data.captions
        if what.caption_orders > 1 or what.long_captions is not None:
            variety = Variety(what.caption_orders, what.caption_keep, what.long_captions, self.recipe.seed)
            captions, goal = CaptionTable(data.pictures, variety), {**goal, "variety": asdict(variety)}
        shaped = (data.shaped.fingerprint, data.held_shaped.fingerprint) if data.shaped and data.held_shaped else ()
        place = self._place("unet", form, goal, _loop(what.train), *upstream, *self._started(), *shaped)
        channels, side = (
            vae.config.latent_channels,
            self.recipe.data.size // 2 ** (len(vae.config.block_out_channels) - 1),
        )
        width = text.config.hidden_size
        device = self.accelerator.device

        def latents(pixels: np.ndarray, shaped: Shaped | None) -> Latents:
            if shaped is None:
                return Latents(self._cached(latent_items(vae, pixels, device)))
            arrays = [self._cached(latent_items(vae, own, device)) for own in shaped.pixels]
            return BucketLatents(arrays[0][:0], tuple(arrays), shaped.bucket, shaped.row)

        def states(texts: Sequence[str]) -> TextStates:
            return TextStates(self._cached(text_items(text, self.words, texts, device)))

        train_latents, train_states = latents(data.pixels, data.shaped), states(captions.texts)
        held = latents(data.held_pixels, data.held_shaped), states(data.held_captions)
        self._seed()
        form |= {"latent_channels": channels, "latent_size": side, "text_width": width}
        unet = self._first_unet(form)
        shard(unet, self.accelerator, LoopSettings(**what.train.model_dump()))
        plan = from_config(scheduler_config(self.recipe))
        times = (what.times, what.times_mean, what.times_std)
        prediction = Prediction(what.prediction)
        denoising = Denoising(plan.schedule, prediction, what.weighting, what.caption_dropout, *times)
        parts = (unet, denoising, train_latents, captions, train_states, data.weights, held, self.accelerator)
        objective = DenoiseObjective(*parts, sheet=lambda: self.sheet(unet))
        if what.align or what.disperse:
            terms = FeatureTerms(what.align, what.disperse)
            targets = self._tower_patches() if what.align else None
            objective = FeatureObjective(*parts, terms=terms, targets=targets, sheet=lambda: self.sheet(unet))
        figures = self._run("unet", objective, what.train, what.gate, place)
        return unsharded(unet, lambda: create.unet(**form)).eval(), figures

    def _first_unet(self, form: Mapping[str, Any]) -> UNet2DConditionModel:
        """The U-Net before its first step."""
        return create.unet(**form)

    def _started(self) -> tuple[str, ...]:
        """What the U-Net's first weights depend on beside the seed."""
        return ()

    def _tower_patches(self) -> np.ndarray:
        tower, pixels = self.clip.vision_model, self.data.pixels
        return self._cached(patch_items(tower, pixels, self.accelerator.device))

    def sheet(self, unet: UNet2DConditionModel) -> Any:
        """The recipe's prompts, rendered by the U-Net as it is now, from fixed noise."""
        from latentgen.pipeline import Pipeline
        from latentgen.training.sheet import contact_sheet

        what = self.recipe
        pipe = Pipeline.from_parts(
            tokenizer=self.words,
            text_encoder=self.text_encoder,
            vae=self.vae,
            unet=unet,
            scheduler_config=scheduler_config(what),
        )
        prompts = list(what.sample.prompts)
        images = pipe(
            prompts, seed=[what.sample.seed + n for n in range(len(prompts))], **what.defaults.model_dump()
        ).images
        return contact_sheet(images, what.sample.columns, prompts)

    # --- the result

    def save(self, unet: UNet2DConditionModel, figures: Mapping[str, Any]) -> None:
        """Write the weights folder, whole or not at all."""
        extras = finish.extra_files(
            name=self.recipe.name,
            recipe=self.recipe.model_dump(mode="json"),
            figures=figures,
            defaults=self.recipe.defaults.model_dump(),
            size=self.recipe.data.size,
            data=self.folder,
            sheet=self.sheet(unet),
        )
        save_pipeline(
            self.out,
            tokenizer=self.words,
            text_encoder=self.text_encoder,
            vae=self.vae,
            unet=unet,
            scheduler_config=scheduler_config(self.recipe),
            extra_files=extras,
            finish=write_graphs,
        )

    # --- shared by the stages

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
        )
        self.figures[name] = dict(figures)
        return figures

    def _cached(self, items: Items) -> np.ndarray:
        with self.accelerator.main_process_first():
            return cached_items(self.state / "cache", items, self.report)


def _told(section: BaseModel, *later: str) -> Mapping[str, Any]:
    """A recipe's section; of the keys that came later, those that are not at their default."""
    told = section.model_dump()
    return {k: v for k, v in told.items() if k not in later or v != type(section).model_fields[k].default}


def _loop(what: Train) -> Mapping[str, Any]:
    return settings_fingerprint(LoopSettings(**what.model_dump()))
