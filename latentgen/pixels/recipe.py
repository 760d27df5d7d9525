"""The recipe of a pixel-space model, `kind = "pixels"`: strict, as all recipes."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from latentgen.errors import InputError
from latentgen.fields import Amount, Endless, Number, Part, Positive, Whole
from latentgen.recipe import Data, Pace, Recipe, Section, Train, read_as, read_kind, read_recipe

Objective = Literal["ddpm", "ve", "vdm", "flow"]


class PixelData(Data):
    """As any data, the main caption of a picture being its class. `grey`: one channel."""

    grey: bool = False


class Network(Section):
    """`blocks`: what the U-Net is made of. `patch`: squares of so many pixels are one place of the network."""

    blocks: Literal["resnet", "convnext"] = "resnet"
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)]
    layers: Positive = 1
    patch: Positive = 1
    head_width: Positive = 32


class Diffusion(Section):
    """What the families need to be told.

    levels, betas, variance: DDPM's table and the variance of its reverse steps ("learned-range" trains L_hybrid); the
    ladder of VE has as many levels. clean, noisy: the ends in logSNR of VE, VDM and flow, which their bound and
    likelihood run between. label_dropout: how often the class is not told.
    """

    levels: Annotated[Whole, Field(ge=2)] = 1000
    betas: Literal["linear", "cosine"] = "linear"
    variance: Literal["fixed-small", "fixed-large", "learned-range"] = "fixed-small"
    clean: Annotated[Number, Field(gt=0, le=20)] = 10.0
    noisy: Annotated[Number, Field(ge=-20, lt=0)] = -8.0
    label_dropout: Part = 0.1


class Sample(Section):
    """The sheet: `rows` pictures of each class, fixed noise. `sampler`: left empty, the family's own."""

    rows: Positive = 4
    steps: Positive = 50
    sampler: str = ""
    guidance: Amount = 1.0
    seed: Whole = 0


class Likelihood(Section):
    """What the report at the end is made from: so many held-out pictures.

    bound_levels: of DDPM's ladder; bound_samples: times a picture for the others. probes, tolerance: of the ODE.
    """

    pictures: Annotated[Whole, Field(ge=2)] = 64
    bound_levels: Annotated[Whole, Field(ge=2)] = 250
    bound_samples: Positive = 64
    probes: Positive = 1
    tolerance: Annotated[Number, Field(gt=0, lt=1)] = 1e-4
    batch: Positive = 64


class PixelRecipe(Section):
    """One labelled model in pixels, of one family: `objective` is the key that switches."""

    kind: Literal["pixels"]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    objective: Objective
    seed: Annotated[Whole, Field(ge=0)] = 0
    data: PixelData
    network: Network
    diffusion: Diffusion = Diffusion()
    train: Train
    sample: Sample = Sample()
    likelihood: Likelihood = Likelihood()
    gate: dict[str, Endless] = Field(default_factory=dict)
    validation: Annotated[Whole, Field(ge=2)] = 256
    pace: Pace = Pace()


def read_pixel_recipe(path: Path, **changes: Any) -> PixelRecipe:
    """The recipe in a TOML file, with some of its top-level keys changed. Raises InputError, naming the key."""
    recipe = read_as(PixelRecipe, path, changes)
    if recipe.data.buckets is not None:
        raise InputError(f"recipe {path}: a pixel model learns from squares alone; take [data.buckets] away")
    return recipe


def read_any_recipe(path: Path) -> Recipe | PixelRecipe:
    """A recipe of either kind. Raises InputError, naming the key."""
    return read_pixel_recipe(path) if read_kind(path) == "pixels" else read_recipe(path)
