"""From a recipe to objects, through explicit tables; and `train`, which runs a recipe's stages in their order."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentgen.checkpoint import save_pipeline
from latentgen.data.variants import SIDED, Augmentation
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import from_config
from latentgen.durable import alone, remove_leftovers, write_file
from latentgen.foundations import Foundations, loop_of
from latentgen.models import create
from latentgen.models.onnx.export import write_graphs
from latentgen.recipe import Recipe, Unet, read_kind, read_recipe
from latentgen.training import board, finish
from latentgen.training.autoencoder import AdversaryLoss
from latentgen.training.cache import content_of
from latentgen.training.captions import CaptionTable, Variety
from latentgen.training.decoder import DecoderObjective, Drawing, Painter
from latentgen.training.denoise import DenoiseObjective, Denoising, Latents
from latentgen.training.features import FeatureObjective, FeatureTerms, patch_items
from latentgen.training.loop import LoopSettings
from latentgen.training.report import write_page
from latentgen.training.sharding import shard, unsharded
from latentgen.training.stage import Report

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


def train(recipe: Path, out: Path | None = None, data: Path | None = None, report: Report = print) -> Path:
    """Train every stage of a recipe and write the weights folder; what is done already is not done again.

    out: the weights folder, `weights/NAME` if not given; the run's own state (checkpoints, caches, logs, sheets) stands
    beside it in `OUT.training`. data: a captioned folder instead of the recipe's. Returns the weights folder.
    Raises InputError for a recipe, a folder or a gate that does not hold.
    """
    if read_kind(recipe) == "pixels":
        from latentgen.pixels.build import train as train_pixels

        return train_pixels(recipe, out, data, report)
    what = read_recipe(recipe)
    run = Run(what, out or Path("weights") / what.name, data or what.data.folder, report)
    return run.all()


def scheduler_config(recipe: Recipe) -> Mapping[str, Any]:
    """What diffusers' scheduler_config.json says of the recipe's diffusion."""
    if recipe.unet.schedule == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    return finish.scheduler_config(recipe.unet.schedule, recipe.unet.prediction)


def asked_unet(what: Unet) -> dict[str, Any]:
    """The form a recipe asks of the U-Net."""
    form: dict[str, Any] = what.model_dump(include={"channels", "layers", "head_width"})
    return form | {key: value for key in ("pooled", "dropout") if (value := getattr(what, key))}


def unet_form(recipe: Recipe, vae: Any, text_width: int) -> dict[str, Any]:
    """All that `create.unet` is given: the form asked for, and what follows from the VAE's config and the texts."""
    side = recipe.data.size // 2 ** (len(vae.block_out_channels) - 1)
    follows = {"latent_channels": vae.latent_channels, "latent_size": side, "text_width": text_width}
    return {**asked_unet(recipe.unet), **follows}


class Run(Foundations):
    """One run of a recipe, from the data to a weights folder."""

    def all(self) -> Path:
        """Tokenizer, CLIP, VAE, U-Net, layout and decoder where they are asked for, weights folder."""
        finish.check_places(self.out, self.folder, self.recipe.data.captions)
        self.report(f"{self.recipe.name}: on {self.accelerator.device}, {self.accelerator.num_processes} process(es)")
        if not board.is_there():
            self.report(f"{self.recipe.name}: {board.ABSENT}")
        main = self.accelerator.is_main_process
        with alone(self.state) if main else nullcontext():
            if main:
                remove_leftovers(self.state)
            unet, figures = self.unet
            _ = self.finished_vae
            if main:
                self.save(unet, {**self.figures, "unet": dict(figures)})
                self.report(f"{self.recipe.name}: wrote {self.out}")
                page = self.state / "report.html"
                write_file(page, write_page(self.recipe.name, self.state, self.figures, self._resolved).encode())
                self.report(f"{self.recipe.name}: curves and sheets are in {page}")
        return self.out

    @cached_property
    def unet(self) -> tuple[UNet2DConditionModel, Mapping[str, float]]:
        """The U-Net, trained, and its figures."""
        what, data = self.recipe.unet, self.data
        vae, text = self.vae, self.text_encoder
        upstream = (content_of(vae), content_of(text), data.fingerprint)
        form = asked_unet(what)
        goal = what.model_dump(include={"schedule", "prediction", "weighting", "caption_dropout"})
        goal |= {key: value for key in ("align", "disperse") if (value := getattr(what, key))}
        if what.times != "uniform":
            goal |= what.model_dump(include={"times", "times_mean", "times_std"})
        if what.augment is not None:
            goal["augment"] = what.augment.model_dump()
        captions = data.captions
        if what.caption_orders > 1 or what.long_captions is not None:
            variety = Variety(what.caption_orders, what.caption_keep, what.long_captions, self.recipe.seed)
            captions, goal = CaptionTable(data.pictures, variety), {**goal, "variety": asdict(variety)}
        shaped = (data.shaped.fingerprint, data.held_shaped.fingerprint) if data.shaped and data.held_shaped else ()
        place = self._place("unet", form, goal, loop_of(what.train), *upstream, *self._started(), *shaped)
        train_latents, train_states = self._shaped_latents(data.pixels, data.shaped), self._states(captions.texts)
        held = self._shaped_latents(data.held_pixels, data.held_shaped), self._states(data.held_captions)
        self._seed()
        form = self._unet_form
        unet = self._first_unet(form)
        shard(unet, self.accelerator, LoopSettings(**what.train.model_dump()))
        plan = from_config(scheduler_config(self.recipe))
        times = (what.times, what.times_mean, what.times_std)
        prediction = Prediction(what.prediction)
        denoising = Denoising(plan.schedule, prediction, what.weighting, what.caption_dropout, *times)
        parts = (unet, denoising, train_latents, captions, train_states, data.weights, held, self.accelerator)
        others = self._varied_latents()
        objective = DenoiseObjective(*parts, others=others, sheet=lambda: self.sheet(unet))
        if what.align or what.disperse:
            terms = FeatureTerms(what.align, what.disperse)
            targets = self._tower_patches() if what.align else None
            objective = FeatureObjective(
                *parts, terms=terms, targets=targets, others=others, sheet=lambda: self.sheet(unet)
            )
        figures = self._run("unet", objective, what.train, what.gate, place)
        return unsharded(unet, lambda: create.unet(**form)).eval(), figures

    def _varied_latents(self) -> tuple[Latents, ...]:
        """The pictures to train on in their other versions, where the recipe asks for them."""
        asked, data = self.recipe.unet.augment, self.data
        if asked is None:
            return ()
        sided = SIDED if asked.sided is None else asked.sided
        what = Augmentation(asked.versions, asked.mirror, asked.scale, sided, self.recipe.seed)
        may, shaped = what.may_mirror(data.pictures), data.shaped
        self.report(what.line(may))
        if shaped is None:
            return tuple(self._latents(version) for version in what.others(data.pixels, may))
        of_bucket = [what.others(own, may[shaped.bucket == n]) for n, own in enumerate(shaped.pixels)]
        return tuple(self._bucketed(shaped, arrays) for arrays in zip(*of_bucket, strict=True))

    @property
    def _unet_form(self) -> dict[str, Any]:
        return unet_form(self.recipe, self.vae.config, self.text_encoder.config.hidden_size)

    def _first_unet(self, form: Mapping[str, Any]) -> UNet2DConditionModel:
        """The U-Net before its first step."""
        return create.unet(**form)

    def _started(self) -> tuple[str, ...]:
        """What the U-Net's first weights depend on beside the seed."""
        return ()

    def _tower_patches(self) -> np.ndarray:
        tower, pixels = self.clip.vision_model, self.data.pixels
        return self._cached(patch_items(tower, pixels, self.accelerator.device))

    # --- decoder

    @cached_property
    def finished_vae(self) -> AutoencoderKL:
        """The VAE as it is saved: where the recipe asks for it, its decoder knows what the U-Net draws."""
        what, data, (unet, _) = self.recipe.decoder, self.data, self.unet
        if what is None:
            return self.vae
        vae, plan = copy.deepcopy(self.vae), from_config(scheduler_config(self.recipe))
        terms = AdversaryLoss(**what.loss.model_dump())
        drawing = Drawing(what.noise, what.drawn, what.depth, self.recipe.defaults.guidance_scale)
        upstream = (content_of(vae), content_of(unet), content_of(self.text_encoder), data.fingerprint)
        self._seed()
        objective = DecoderObjective(
            vae,
            Painter(unet, plan, drawing.guidance),
            self._latents(data.pixels),
            data.captions,
            self._states(data.captions.texts),
            data.pixels,
            data.weights,
            (self._latents(data.held_pixels), self._states(data.held_captions), data.held_pixels),
            self.accelerator,
            drawing=drawing,
            terms=terms,
        )
        told = {**asdict(drawing), **(asdict(terms) if terms != AdversaryLoss() else {})}
        place = self._place("decoder", told, loop_of(what.train), *upstream)
        self._run("decoder", objective, what.train, what.gate, place)
        return vae.eval().requires_grad_(False)

    def sheet(self, unet: UNet2DConditionModel, vae: AutoencoderKL | None = None) -> Any:
        """The recipe's prompts, rendered by the U-Net as it is now, from fixed noise. vae: another than `self.vae`."""
        from latentgen.pipeline import Pipeline
        from latentgen.training.sheet import contact_sheet

        what = self.recipe
        pipe = Pipeline.from_parts(
            tokenizer=self.words,
            text_encoder=self.text_encoder,
            vae=vae or self.vae,
            unet=unet,
            scheduler_config=scheduler_config(what),
        )
        prompts = list(what.sample.prompts)
        images = pipe(
            prompts, seed=[what.sample.seed + n for n in range(len(prompts))], **what.defaults.model_dump()
        ).images
        return contact_sheet(images, what.sample.columns, prompts)

    # --- the result

    @property
    def _resolved(self) -> dict[str, Any]:
        """The recipe as it is kept with the weights."""
        return self.recipe.model_dump(mode="json")

    @property
    def _credits_before(self) -> str:
        """Whose pictures its first weights learned from, as their card says it."""
        return ""

    def save(self, unet: UNet2DConditionModel, figures: Mapping[str, Any]) -> None:
        """Write the weights folder, whole or not at all."""
        extras = finish.extra_files(
            name=self.recipe.name,
            recipe=self._resolved,
            figures=figures,
            defaults=self.recipe.defaults.model_dump(),
            size=self.recipe.data.size,
            data=self.folder,
            sheet=self.sheet(unet, self.finished_vae),
            credits_before=self._credits_before,
        )
        save_pipeline(
            self.out,
            tokenizer=self.words,
            text_encoder=self.text_encoder,
            vae=self.finished_vae,
            unet=unet,
            scheduler_config=scheduler_config(self.recipe),
            extra_files=extras,
            finish=write_graphs,
        )
