"""Recipes: strict TOML into frozen objects. A key that is not known is an error that names the nearest right one."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from latentgen.errors import InputError
from latentgen.fields import Above, Amount, Below, Endless, Number, Part, Positive, Scale, Whole, explained, is_written

SamplerName = Literal[  # those of `diffusion.sampling`, which would bring in numpy
    "dpmpp-2m",
    "unipc",
    "deis",
    "ddim",
    "euler",
    "heun",
    "lms",
    "plms",
    "pndm",
    "probability-flow",
    "ddpm",
    "euler-ancestral",
    "dpmpp-2m-sde",
    "dpmpp-sde",
    "lcm",
    "predictor-corrector",
    "langevin",
]
KINDS = ("latent", "pixels")  # of recipes: a text-to-image model in latents; `latentgen.pixels.recipe`


class Section(BaseModel):
    """A table of a recipe: strict, frozen, no key that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class Train(Section):
    """The loop of a stage. `batch` counts all processes; `rate` is the optimiser's, `decay` the part of the run in
    which it falls. `accumulate`: parts of a batch computed one after the other, to save memory. `averages`: relative
    widths of power-function averages to keep, from which any other is made after training (Karras et al. 2024).
    `activation_checkpointing`: blocks are computed once more for their gradients instead of being kept, to save memory.
    """

    steps: Positive
    batch: Positive
    rate: Above
    warmup: Positive = 100
    decay: Part = 0.3
    weight_decay: Amount = 0.01
    betas: tuple[Below, Below] = (0.9, 0.99)
    clip: Annotated[Endless, Field(gt=0)] = 1.0
    ema: Below = 0.999
    decay_shape: Literal["linear", "cosine"] = "linear"
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "sgd", "muon"] = "adamw"
    accumulate: Positive = 1
    activation_checkpointing: bool = False
    averages: tuple[Annotated[Number, Field(gt=0, lt=0.288)], ...] = ()
    kept_averages: Positive = 16

    @model_validator(mode="after")
    def _heard_by_the_loop(self, info: ValidationInfo) -> Self:
        if not is_written(info):
            return self
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}; it must divide the batch of {self.batch}")
        if self.optimizer == "adafactor" and self.betas != Train.model_fields["betas"].default:
            raise ValueError('betas are not adafactor\'s, which has none; take them away, or write optimizer = "adamw"')
        if self.decay_shape != "linear" and not self.decay:
            raise ValueError("decay_shape is of a rate that falls, and decay is 0; take one of them away")
        if not self.averages and self.kept_averages != Train.model_fields["kept_averages"].default:
            raise ValueError("kept_averages is of averages, and there are none; write averages too, or neither")
        return self


class Buckets(Section):
    """Shapes of about size x size pixels that the U-Net's pictures keep, sides in multiples of `step` (None: the
    smallest that VAE and U-Net take); `ratio`: the longest shape. `largest_crop`: the part of a picture's area that may
    be cut away; `upscale`: whether smaller pictures are enlarged. What fits none is left out and listed. The squares of
    CLIP and VAE are size x size whatever the picture: the middle of a long one may be enlarged for them.
    """

    step: Positive | None = None
    ratio: Annotated[Number, Field(ge=1)] = 2.0
    largest_crop: Part = 0.1
    upscale: bool = False


class Data(Section):
    """The captioned folder, the side in pixels, and which split is kept for testing.

    `folders`: those named train, test or validation are splits, where nothing else says a picture's. `hold_out`: where
    no picture is in that split then, this part of them is, by a hash of the file names. `captions`: from "files"
    (tables and sidecars) or from the "names" of the pictures. `background`: the colour under transparent ones.
    `weights` says how often pictures are seen: a column of the metadata, its values, a factor each (1 where unnamed).
    `buckets`: the U-Net learns from pictures in nearly their own shape; CLIP and VAE learn from squares out of them.
    `upscale`: whether pictures with a side below `size` are enlarged, or left out and listed; buckets have their own.
    """

    folder: Path
    size: Positive
    held_out: str = "test"
    hold_out: Below = 0.05
    captions: Literal["files", "names"] = "files"
    background: str = "white"
    folders: bool = True
    weights: dict[str, dict[str, Amount]] = {}
    buckets: Buckets | None = None
    upscale: bool = False


class Tokenizer(Section):
    """A byte-level BPE; `context` in tokens, start and end included."""

    vocabulary: Positive
    context: Annotated[Whole, Field(ge=4)] = 77


class Clip(Section):
    """Both towers have one width."""

    width: Positive
    heads: Positive
    patch: Positive
    text_layers: Positive
    image_layers: Positive
    gate: dict[str, Endless] = {}
    train: Train

    @model_validator(mode="after")
    def _compares_its_batch(self, info: ValidationInfo) -> Self:
        if self.train.accumulate > 1 and is_written(info):
            raise ValueError("CLIP compares the pictures of a batch with each other; leave accumulate at 1")
        return self


class Layout(Section):
    """The text encoder's last `grid`² places learn what a caption's picture looks like (`training.layout`); `keep`
    holds its other states near what CLIP made of them.
    """

    grid: Annotated[Whole, Field(ge=2, le=8)] = 4
    keep: Amount = 0.02
    caption_dropout: Part = 0.1
    gate: dict[str, Endless] = {}
    train: Train


def _of_an_adversary(loss: Any, info: ValidationInfo) -> Any:
    key = "matching" if loss.matching else "adversary_start" if loss.adversary_start and is_written(info) else None
    if key and not loss.adversary:
        raise ValueError(f"{key} is of an adversary, and there is none; set adversary above 0 too")
    return loss


class VaeLoss(Section):
    """Weights of the VAE's terms beside L1, each a mean over elements; `equivariance` is a part of the steps."""

    kl: Amount = 5e-4
    perceptual: Amount = 0.1
    adversary: Amount = 0.0
    adversary_start: Annotated[Whole, Field(ge=0)] = 0
    matching: Amount = 0.0
    equivariance: Part = 0.0

    _alone = model_validator(mode="after")(_of_an_adversary)


class Vae(Section):
    """An AutoencoderKL; one level more halves the side once more."""

    channels: Annotated[tuple[Positive, ...], Field(min_length=1)]
    latent_channels: Positive
    layers: Positive = 1
    groups: Positive = 8
    loss: VaeLoss = VaeLoss()
    gate: dict[str, Endless] = {}
    train: Train


class DecoderLoss(Section):
    """Weights of the decoder's terms beside L1, as the VAE's."""

    adversary: Amount = 0.0
    adversary_start: Annotated[Whole, Field(ge=0)] = 0
    matching: Amount = 0.0

    _alone = model_validator(mode="after")(_of_an_adversary)


class Decoder(Section):
    """The VAE's decoder, trained on with the encoder frozen, on latents with noise of up to `noise` standard deviations
    and, for the part `drawn` of them, on latents that the U-Net drew from a time of up to `depth` (`training.decoder`).
    """

    noise: Amount = 0.3
    drawn: Part = 0.5
    depth: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    loss: DecoderLoss = DecoderLoss()
    gate: dict[str, Endless] = {}
    train: Train


class Augment(Section):
    """Each picture in so many `versions`, the first as it is (`data.variants`). The others are made smaller or larger
    by a factor between the two of `scale`, and where `mirror` asks for it every second is mirrored, but for pictures
    whose captions have one of the words of `sided` (None: left, right, letters and the like). Left out, `versions` is
    4, and 2 where they are mirrored alone.
    """

    mirror: bool = False
    scale: tuple[Scale, Scale] = (1.0, 1.0)
    sided: tuple[str, ...] | None = None
    versions: Annotated[Whole, Field(ge=2)] = Field(
        default_factory=lambda told: 2 if told.get("mirror") and told.get("scale") == (1.0, 1.0) else 4
    )

    @model_validator(mode="after")
    def _changes_something(self, info: ValidationInfo) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is {list(self.scale)}; write the smaller factor first")
        if self.scale == (1.0, 1.0) and not self.mirror:
            raise ValueError("every version would be the same; set mirror = true, or scale = [0.9, 1.0]")
        if self.scale == (1.0, 1.0) and self.versions > 2:
            raise ValueError("a mirrored picture is one version more; set versions = 2 or none, or a scale too")
        if self.sided is not None and not self.mirror and is_written(info):
            raise ValueError("sided says which pictures are not mirrored, and none is; set mirror = true too")
        return self


class Unet(Section):
    """A UNet2DConditionModel and the diffusion it learns.

    `caption_orders`: a caption of comma-separated parts is learned in so many orders, its first `caption_keep` parts
    staying in front; `long_captions`: how often a picture is told by its longest caption (`training.captions`).
    `schedule` and `prediction` "flow", both or neither: rectified flow, from picture to noise on a straight line.
    `times`, `times_mean`, `times_std`: how the times it is trained at are spread (`diffusion.loss.times`).
    `pooled`: every block is also told the caption as a whole, with the time. `dropout`: of its blocks, in training.
    `align`, `disperse`: weights of what is asked of its middle while it trains (`training.features`).
    `augment`: it learns from the pictures varied too; CLIP and VAE, which move them a little at every step, do not.
    """

    channels: Annotated[tuple[Positive, ...], Field(min_length=1)]
    layers: Positive = 1
    head_width: Positive = 32
    pooled: bool = False
    dropout: Part = 0.0
    schedule: Literal["cosine", "scaled-linear", "linear", "flow"] = "cosine"
    prediction: Literal["eps", "x0", "v", "flow"] = "v"
    weighting: Literal["simple", "min-snr", "p2", "sigmoid", "bound", "edm"] = "simple"
    times: Literal["uniform", "logit-normal", "lognormal-sigma"] = "uniform"
    times_mean: Number | None = None
    times_std: Above | None = None
    caption_dropout: Part = 0.1
    caption_orders: Positive = 1
    caption_keep: Annotated[Whole, Field(ge=0)] = 1
    long_captions: Part | None = None
    align: Amount = 0.0
    disperse: Amount = 0.0
    augment: Augment | None = None
    gate: dict[str, Endless] = {}
    train: Train

    @model_validator(mode="after")
    def _belong_together(self, info: ValidationInfo) -> Self:
        if (self.schedule == "flow") != (self.prediction == "flow"):
            raise ValueError('schedule = "flow" and prediction = "flow" belong together; write both or neither')
        if self.times == "uniform" and (self.times_mean, self.times_std) != (None, None):
            raise ValueError('times_mean and times_std are of times = "logit-normal", say; write that too')
        if self.disperse and self.train.accumulate > 1 and is_written(info):
            raise ValueError("disperse compares the pictures of a batch with each other; leave accumulate at 1")
        if self.align and self.augment:
            raise ValueError("align compares pictures as they are, augment varies them; take one of them away")
        return self


class Sample(Section):
    """The sheet drawn while the U-Net trains: fixed prompts, fixed noise."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    columns: Positive = 8
    seed: Whole = 0


class Defaults(Section):
    """How the finished weights are rendered unless told otherwise; the sheets are drawn with it."""

    num_inference_steps: Positive = 25
    guidance_scale: Amount = 4.0
    sampler: SamplerName = "dpmpp-2m"


class Pace(Section):
    """When a stage looks up from its work."""

    log_seconds: Annotated[Endless, Field(ge=0)] = 10.0
    save_seconds: Annotated[Endless, Field(ge=0)] = 300.0
    validate_steps: Positive = 500


class Recipe(Section):
    """One trainable pipeline: a data set, its stages, and how to look at the result. Without `layout` CLIP's text tower
    is the text encoder as it is, without `decoder` the VAE's decoder stays as the VAE's own stage left it.

    `precision`: what matrix products are computed in while it trains, the weights being fp32; "auto" is bf16 where the
    hardware multiplies it (a GPU since Ampere, a CPU with AVX512-BF16 or AMX) and fp32 elsewhere.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    seed: Whole = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    data: Data
    tokenizer: Tokenizer
    clip: Clip
    layout: Layout | None = None
    vae: Vae
    unet: Unet
    decoder: Decoder | None = None
    sample: Sample
    defaults: Defaults = Defaults()
    pace: Pace = Pace()

    @model_validator(mode="after")
    def _networks_can_be_made(self) -> Self:
        factor = 2 ** (len(self.vae.channels) - 1)
        odd = [width for width in self.unet.channels if width % 32 or width < self.unet.head_width]
        for wrong, said in (
            (
                self.data.size % factor,
                f"data.size {self.data.size} is no multiple of {factor}, as vae.channels halve it",
            ),
            (self.clip.patch > self.data.size, f"clip.patch {self.clip.patch} is more than data.size {self.data.size}"),
            (self.clip.width % self.clip.heads, f"clip.width {self.clip.width} is no multiple of clip.heads"),
            (
                any(c % self.vae.groups for c in self.vae.channels),
                "each of vae.channels is to be a multiple of vae.groups",
            ),
            (odd, f"unet.channels has {odd[:1]}; each must be a multiple of 32, and unet.head_width at least"),
        ):
            if wrong:
                raise ValueError(said)
        return self


Form = TypeVar("Form", bound=Section)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises InputError, naming the key, for anything that is not right in it."""
    kind = read_kind(path)
    if kind != KINDS[0]:
        raise InputError(f"recipe {path} is of kind {kind!r}, and only latentgen train and doctor take those")
    return read_as(Recipe, path)


def read_kind(path: Path) -> str:
    """What a recipe's key `kind` says: "latent" where there is none. Raises InputError for one that is not known."""
    kind = read_table(path).get("kind", KINDS[0])
    if kind not in KINDS:
        raise InputError(f"recipe {path}: kind is {kind!r}; it can be one of: {', '.join(KINDS)}")
    return str(kind)


def read_as(form: type[Form], path: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Form:
    """A recipe of one form, some of its top-level keys changed; raises InputError, naming the key."""
    table = {**read_table(path), **changes}
    if "kind" not in form.model_fields and table.get("kind") == KINDS[0]:
        del table["kind"]
    return explained(form, table, f"recipe {path}", written=True)


def read_table(path: Path) -> dict[str, Any]:
    """What stands in a recipe, not looked at yet. Raises InputError where it is no TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = sorted(str(found) for found in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f"; there is {', '.join(near)}" if near else "; give a .toml file such as pipelines/icons.toml"
        raise InputError(f"recipe {path} does not exist{hint}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read ({error}); give a .toml file") from None
