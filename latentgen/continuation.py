"""A run that goes on from a finished weights folder: its U-Net trains on, or its decoder alone; all else stays.

But for a layout that the recipe asks for and the folder has not learned, which its text encoder learns first; and for
the decoder, which is trained on for the new U-Net where the recipe asks for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentgen.build import Run, scheduler_config, unet_form
from latentgen.checkpoint import Checkpoint, open_folder
from latentgen.diffusion.schedule import from_config
from latentgen.errors import InputError
from latentgen.models import create
from latentgen.models.loading import load_part, without_weights
from latentgen.recipe import Recipe, Unet, read_recipe
from latentgen.training.finish import Before
from latentgen.training.stage import Report

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from latentgen.training.intake import TrainingData

ALIKE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


def train_on(
    recipe: Path,
    start: Path,
    out: Path | None = None,
    data: Path | None = None,
    report: Report = print,
    *,
    only: str | None = None,
) -> Path:
    """Train the U-Net of the weights folder `start` further, as the recipe's [unet.train] says; as `build.train` else.

    The tokenizer, the text encoder and the VAE are taken as they are. only: "decoder", where the U-Net too is taken as
    it is. Returns the weights folder. Raises InputError also where the U-Net, the schedule or the prediction is not the
    recipe's.
    """
    what = read_recipe(recipe)
    place = out or Path("weights") / what.name
    refuse_itself(start, place)
    return Continuation(what, place, data or what.data.folder, report, open_start(what, start), only).all()


def open_start(recipe: Recipe, start: Path) -> Checkpoint:
    """The weights folder that a recipe goes on from. Raises InputError where its networks are not the recipe's.

    No weights are read, so that it is said before anything is computed.
    """
    found = open_folder(start)
    if found.has_second:
        raise InputError(f"{start} has two text encoders; training goes on from one with a single one")
    asked, trained = scheduler_config(recipe), found.config("scheduler")
    schedules = [(f"unet.schedule ({key})", asked[key], trained.get(key)) for key in ALIKE if key in asked]
    vae, unet = without_weights(found, "vae"), without_weights(found, "unet")
    width = int(found.config("text_encoder").get("hidden_size", 512))  # transformers' own where it says none
    for key, said, own in (
        ("unet.prediction", recipe.unet.prediction, from_config(trained).prediction.name),
        *schedules,
        *_told_of(recipe.unet, unet.config),
        *_sides_of(recipe, vae.config),
    ):
        if said != own:
            raise InputError(f"the recipe says {key} = {said}, {start} has {own}; write the same")
    with torch.device("meta"):
        fresh = create.unet(**unet_form(recipe, vae.config, width))
    asked, trained = _form(fresh), _form(unet)  # heads do not show in the shapes of the weights
    for key, value in asked.items():
        if value != trained.get(key):
            raise InputError(
                f"the U-Net of {start} is of no form that [unet] can ask for: its {key} is {trained.get(key)}, where "
                f"training makes {value}; go on from weights of latentgen train"
            )
    return found


def _told_of(asked: Unet, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each key of [unet] that is the network's form: its name, what the recipe says, what a U-Net's config tells."""
    channels, heads = list(config["block_out_channels"]), config["num_attention_heads"] or config["attention_head_dim"]
    counts = [heads] * len(channels) if isinstance(heads, int) else heads
    widths = [width // count for width, count in zip(channels, counts, strict=True)]
    yield "unet.channels", list(asked.channels), channels
    yield "unet.layers", asked.layers, config["layers_per_block"]
    yield "unet.head_width", asked.head_width, widths[0] if len(set(widths)) == 1 else widths
    yield "unet.pooled", asked.pooled, config["addition_embed_type"] == "text"
    yield "unet.dropout", asked.dropout, config["dropout"]


def _sides_of(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """As `_told_of`, vae.channels, where how often they halve a side tells which sides pictures may have.

    What else the recipe says of CLIP and VAE is not used: they are taken as they are.
    """
    asked, own = list(recipe.vae.channels), list(config["block_out_channels"])
    if len(asked) != len(own) and (recipe.data.buckets is not None or recipe.data.size % 2 ** (len(own) - 1)):
        yield "vae.channels", asked, own


def refuse_itself(start: Path, out: Path) -> None:
    """Raises InputError where a run would replace the weights that it goes on from."""
    if out.resolve() == start.resolve():
        raise InputError(f"{start} is what training goes on from, and would be replaced; name another place with --out")


def _form(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What a U-Net is, but for the side it was made for, as JSON has it: tuples are lists there."""
    form: dict[str, Any] = json.loads(json.dumps(dict(unet.config), default=str))
    return {key: value for key, value in form.items() if not key.startswith("_") and key != "sample_size"}


@dataclass
class Continuation(Run):
    """A run of a recipe's last stages, which `open_start` has found to be of the form of what it goes on from.

    only: the one stage that is run, "decoder"; None is all there are.
    """

    start: Checkpoint
    only: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only == "decoder" and self.recipe.decoder is None:
            raise InputError("--only decoder needs a [decoder] in the recipe; add it, with its [decoder.train]")
        if self.recipe.unet.align:
            raise InputError("align needs CLIP's image tower, which a finished folder does not hold; set align = 0")

    @cached_property
    def data(self) -> TrainingData:
        """The pictures of the run; that some held out now may have been trained on before is said."""
        told, now = self._before.recipe.get("data") or {}, self.recipe.data
        split, part = (told.get(key, getattr(now, key)) for key in ("held_out", "hold_out"))
        if split != now.held_out or now.hold_out > part:
            self.report(
                f"data: pictures are held out that {self.start.folder.name} may have been trained on: its recipe says "
                f"hold_out = {part:g}, held_out = {split!r}; write the same"
            )
        data, folders = super().data, bool(told.get("folders"))  # of before the key: none was taken for a split
        if told and folders != now.folders and (folders or self.placed):
            self.report(
                f"data: pictures are held out that {self.start.folder.name} may have been trained on: it took "
                f"{'' if folders else 'no '}folders for splits; write folders = {str(folders).lower()} in [data]"
            )
        return data

    @cached_property
    def words(self) -> CLIPTokenizer:
        """The tokenizer it started with."""
        return self._reported(create.read_tokenizer(self.start.folder / "tokenizer"))

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder it started with; where the recipe asks for a layout that was not learned yet, with that."""
        encoder: CLIPTextModel = load_part(self.start, "text_encoder")
        return encoder if self._before.has_layout else self._laid_out(encoder)

    @cached_property
    def _before(self) -> Before:
        """What the folder tells of the training before."""
        return Before.of(self.start.folder)

    @property
    def _credits_before(self) -> str:
        return self._before.credits

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder it started with."""
        vae: AutoencoderKL = load_part(self.start, "vae")
        return vae

    @cached_property
    def unet(self) -> tuple[UNet2DConditionModel, Mapping[str, float]]:
        """The U-Net, trained on or as it is, and its figures."""
        if self.only is None:
            return super().unet
        unet = self._first_unet(self._unet_form).requires_grad_(False).eval()
        return unet.to(self.accelerator.device), self._before.figures.get("unet", {})

    def _first_unet(self, form: Mapping[str, Any]) -> UNet2DConditionModel:
        fresh = create.unet(**form)
        fresh.load_state_dict(load_part(self.start, "unet").state_dict())  # in the memory format that trains fastest
        return fresh

    def _started(self) -> tuple[str, ...]:
        return (self.start.fingerprint,)

    @property
    def _resolved(self) -> dict[str, Any]:
        """The recipe; where the U-Net is taken as it is, with what it was made by."""
        told, first = super()._resolved, self._before.recipe.get("unet")
        return {**told, "unet": first} if self.only is not None and first else told

    def save(self, unet: UNet2DConditionModel, figures: Mapping[str, Any]) -> None:
        """Write the weights folder; the figures of what was taken as it is, and the parts before, stand there too."""
        kept = {**self._before.kept, **figures}
        if self.only is None:
            kept["unet"] = {**figures["unet"], **self._before.history()}
        super().save(unet, kept)
